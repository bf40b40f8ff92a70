"""Requests from wherever a user keeps them."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cakeflow.data.builtin import builtin_facts
from cakeflow.errors import ConfigError, Problem, RequestError
from cakeflow.request import EditRequest, parse_requests


def read_requests(source: Any) -> list[EditRequest]:
    """Read and check requests.

    Args:
        source: ``"builtin"``; a ``.json`` (one list) or ``.jsonl`` file, either also ``.gz``; a list of requests or
            mappings; or a ``datasets.Dataset``. Schemas: ours, CounterFact's and zsRE's (MEND), unchanged.

    Returns:
        The requests in order.

    Raises:
        ConfigError: If there is no such file.
        RequestError: Listing every fault of every entry.
    """
    if isinstance(source, (str, Path)):
        if source == "builtin":
            return builtin_facts()
        return parse_requests(read_entries(Path(source)))
    if isinstance(source, (EditRequest, Mapping)):
        return parse_requests([source])
    if not isinstance(source, Iterable):
        raise ConfigError(f"requests must be a path, a list or a data set, got {type(source).__name__}")
    return parse_requests(source)


def read_entries(path: Path) -> list[Any]:
    """The entries of a ``.json`` or ``.jsonl`` file (either also ``.gz``), whatever their schema.

    Raises:
        ConfigError: If there is no such file, or it is not UTF-8.
        RequestError: Naming the broken line.
    """
    if not path.is_file():
        raise ConfigError(f"no file {str(path)!r} with requests; give a .json or .jsonl file, or 'builtin'")
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}") from error
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        return [_parse_line(path, number, line) for number, line in lines]
    entries = _parse_line(path, 1, text)
    return entries if isinstance(entries, list) else [entries]


def _parse_line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        at = number + error.lineno - 1
        remedy = f"broken JSON in {path}, line {at}, column {error.colno}: {error.msg}"
        raise RequestError([Problem(at, "line", line.split("\n")[error.lineno - 1][:80], remedy)]) from error
