"""An append-only ledger: one JSON line per entry, each with the hash of the one before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cakeflow.errors import LedgerError
from cakeflow.storage.atomic import append_line, truncate

FIELDS = {"number": int, "kind": str, "time": str, "body": dict, "previous": str, "hash": str}


@dataclass(frozen=True)
class Entry:
    """One line of a ledger.

    Attributes:
        number: Its place, from 0.
        kind: What it tells of: ``model``, ``run``, ``evaluation``, ``batch``, ``rollback``, ``policy`` or ``end``.
        time: When it was written (UTC, ISO 8601).
        body: What happened.
        previous: Hash of the entry before; empty in the first one.
        hash: SHA-256 of this entry's line without its hash.
    """

    number: int
    kind: str
    time: str
    body: dict[str, Any]
    previous: str
    hash: str = ""

    def sealed(self) -> Entry:
        """The entry with its hash."""
        values = {**vars(self), "hash": ""}
        return Entry(**{**values, "hash": hashlib.sha256(canonical(values)).hexdigest()})

    @property
    def line(self) -> bytes:
        """The entry as it stands in the file."""
        return canonical(vars(self))


def canonical(value: Mapping[str, Any]) -> bytes:
    """JSON in one form only: sorted names, no spaces, ASCII; numbers must be finite."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def finite(value: Any) -> Any:
    """Data with None in the place of numbers that are not finite: JSON knows none."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {str(name): finite(part) for name, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, (list, tuple)) else value


class Ledger:
    """A ledger file, to be read and added to.

    A last line without its end was never acknowledged: it is left out, and cut off when the next entry is added.

    Args:
        path: The file; it is made by the first entry.

    Raises:
        LedgerError: If an entry is broken, or does not follow the one before.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = [] if not path.exists() else list(read_entries(path))
        self._size = sum(len(entry.line) + 1 for entry in self.entries)

    @property
    def head(self) -> str:
        """Hash of the last entry; empty if there is none."""
        return self.entries[-1].hash if self.entries else ""

    def append(self, kind: str, body: Mapping[str, Any]) -> Entry:
        """Add an entry; when this returns it is on disk."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        entry = Entry(len(self.entries), kind, now, finite(body), self.head).sealed()
        if self.path.exists() and self.path.stat().st_size > self._size:
            truncate(self.path, self._size)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_line(self.path, entry.line)
        self.entries.append(entry)
        self._size += len(entry.line) + 1
        return entry

    def withdraw(self, count: int) -> None:
        """Cut off what follows the first ``count`` entries, which nobody was told of yet."""
        if len(self.entries) > count:
            del self.entries[count:]
            self._size = sum(len(entry.line) + 1 for entry in self.entries)
            truncate(self.path, self._size)


def read_entries(path: Path) -> Iterator[Entry]:
    """The entries of a ledger, each checked against its hash and the one before.

    Raises:
        LedgerError: Naming the entry that is broken.
    """
    previous = ""
    for number, line in enumerate(whole_lines(path)):
        entry = _read(line, f"{path}, entry {number}")
        sound = entry.hash == entry.sealed().hash and entry.line == line
        if not sound or entry.number != number or entry.previous != previous:
            raise LedgerError(f"{path}, entry {number}: {_why(entry, number, sound=sound)}; {REMEDY}")
        previous = entry.hash
        yield entry


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a ledger that have an end."""
    return path.read_bytes().split(b"\n")[:-1]


REMEDY = "the ledger was changed after it was written; take it from a copy"


def _why(entry: Entry, number: int, *, sound: bool) -> str:
    if not sound:
        return "its content does not have its hash"
    if entry.number != number:
        return f"it says that it is entry {entry.number}"
    return "it does not follow the entry before"


def _read(line: bytes, where: str) -> Entry:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise LedgerError(f"{where}: {error}; {REMEDY}") from error
    if not isinstance(found, dict) or set(found) != set(FIELDS):
        raise LedgerError(f"{where}: expected the fields {', '.join(FIELDS)}; {REMEDY}")
    for name, kind in FIELDS.items():
        if not isinstance(found[name], kind) or isinstance(found[name], bool):
            raise LedgerError(f"{where}, {name} = {str(found[name])[:60]!r}: expected {kind.__name__}; {REMEDY}")
    return Entry(**found)
