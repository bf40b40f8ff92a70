"""Reference texts about the new targets, from the file with which the official code compares generations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cakeflow.data.files import read_text
from cakeflow.errors import ConfigError


def with_references(entries: Sequence[Any], path: str | Path) -> Iterator[Any]:
    """Give CounterFact's entries a ``reference``: all texts about their new target, joined as the official code does.

    Args:
        entries: Entries as read; those of another schema pass unchanged, as do those whose target has no text.
        path: ``attribute_snippets.json``: relation id -> target id -> list of ``{"name", "text"}``.

    Raises:
        ConfigError: If there is no such file, or it has another form.
    """
    try:
        snippets = json.loads(read_text(Path(path)))
        texts = {
            (relation, target): " ".join(each["text"] for each in articles)
            for relation, targets in snippets.items()
            for target, articles in targets.items()
        }
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(f"{path}: not relation -> target -> list of {{name, text}}: {error!r}") from error
    for entry in entries:
        reference = texts.get(_target(entry))
        yield {**entry, "reference": reference} if reference else entry


def _target(entry: Any) -> tuple[Any, Any]:
    """Ids of the relation and the new target of an entry of CounterFact."""
    rewrite = entry.get("requested_rewrite") if isinstance(entry, Mapping) else None
    new = rewrite.get("target_new") if isinstance(rewrite, Mapping) else None
    ids = (rewrite.get("relation_id"), new.get("id")) if rewrite and isinstance(new, Mapping) else ()
    return ids if ids and all(isinstance(each, str) for each in ids) else (None, None)
