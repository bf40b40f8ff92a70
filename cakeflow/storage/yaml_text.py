"""YAML texts, whose aliases may not make a short text a huge value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import yaml

MOST_EXPANSION = 10
"""Times that aliases may make a text as long as it is."""
ALWAYS_ALLOWED = 100_000
"""Length that aliases may give to any text."""


def read_yaml(text: str, load: Callable[[str], Any] = yaml.safe_load) -> Any:
    """Read a YAML text.

    Args:
        text: The text.
        load: Function that reads it as data, without running anything.

    Raises:
        yaml.YAMLError: If it is no YAML, or its aliases expand it more than ``MOST_EXPANSION`` times.

    Example:
        >>> read_yaml("{a: &x [1, 2], b: *x}")
        {'a': [1, 2], 'b': [1, 2]}
    """
    value, limit = load(text), max(ALWAYS_ALLOWED, MOST_EXPANSION * len(text))
    length, rest = 0, [value]
    while rest:
        part = rest.pop()
        length += 1
        if isinstance(part, str):
            length += len(part)
            if (
                part != text and "&" in part and "*" in part
            ):  # a setting that is YAML in its turn is read by jsonargparse
                rest.append(_attempt(part, load))
        elif isinstance(part, Mapping):
            rest += [*part.keys(), *part.values()]
        elif isinstance(part, (list, tuple)):
            rest += part
        if length + len(rest) > limit:
            raise yaml.YAMLError(f"its aliases expand a text of {len(text)} characters to more than {limit}")
    return value


def dump_yaml(data: Any) -> str:
    r"""Return data as YAML in the order of its keys, its letters as they are unless a reader would change them then.

    PyYAML folds some line ends of Unicode into spaces.

    Example:
        >>> dump_yaml({"city": "München"}), read_yaml(dump_yaml({"odd": "a\nb\x85c"}))
        ('city: München\n', {'odd': 'a\nb\x85c'})
    """
    readable, escaped = (yaml.safe_dump(data, sort_keys=False, allow_unicode=each) for each in (True, False))
    return readable if _attempt(readable, yaml.safe_load) == yaml.safe_load(escaped) else escaped


def _attempt(text: str, load: Callable[[str], Any]) -> Any:
    try:
        return load(text)
    except (yaml.YAMLError, RecursionError):
        return None
