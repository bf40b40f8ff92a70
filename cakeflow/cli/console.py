"""Output of the commands: what others wrote is shown, never obeyed."""

from __future__ import annotations

import logging

from rich.console import Console

from cakeflow.errors import visible


def say(text: str, end: str = "\n") -> None:
    """Print a plain text: no markup, and escapes for what a terminal would obey."""
    Console().print(visible(text), end=end, soft_wrap=True, markup=False)


class PlainFormatter(logging.Formatter):
    """Messages with escapes for what a terminal would obey; their line feeds stay."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the message of a record."""
        return visible(super().format(record), lines=True)
