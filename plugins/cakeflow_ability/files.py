"""Files of test items, read whole and checked before anything is scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cakeflow.data import read_entries
from cakeflow.errors import ConfigError, Fault, RequestError, has_surrogate, with_faults


def read_items(path: Path, faults: Callable[[int, Any], Iterator[Fault]], fields: str) -> list[dict[str, Any]]:
    """Return the objects of a task's file, one for each line.

    Args:
        path: The file; its stem names the task.
        faults: What yields the faults of an entry, given its place.
        fields: What an entry needs, in words.

    Raises:
        ConfigError: If there is no such file, it is empty, or has faulty lines; all are named.
    """
    if not path.is_file():
        raise ConfigError(f"task {path.stem!r} has no file {str(path)!r}; put it there, or leave the task out of tasks")
    try:
        entries = read_entries(path)
        problems = [fault for i, entry in enumerate(entries) for fault in (*faults(i, entry), *_broken_texts(i, entry))]
    except RequestError as error:
        problems = list(error.faults)
    if problems:
        raise ConfigError(with_faults(f"{len(problems)} problem(s) in {path}:", problems))
    if not entries:
        raise ConfigError(f"{path} is empty; it needs a JSON object per line, with {fields}")
    return list(entries)


def _broken_texts(index: int, entry: Any) -> Iterator[Fault]:
    """Yield the fields with a text that no tokenizer takes."""
    for field, value in entry.items() if isinstance(entry, dict) else ():
        if any(
            isinstance(text, str) and has_surrogate(text) for text in (value if isinstance(value, list) else [value])
        ):
            yield Fault(index, field, value, "has a lone surrogate; give valid Unicode text")
