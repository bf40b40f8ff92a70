"""Extension of griffe: the heading ``Example:`` of a docstring begins a section of examples, as ``Examples:`` does.

Without it griffe takes the section as prose, and ``>>>`` for a quotation.
"""

from __future__ import annotations

from typing import Any

import griffe


class ExamplesSection(griffe.Extension):
    """Renames the heading where a docstring is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename it in one object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("Example:\n", "Examples:\n")
