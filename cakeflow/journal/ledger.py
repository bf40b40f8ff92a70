"""An append-only ledger: one JSON line per entry, each with the hash of the one before."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cakeflow.errors import LedgerError
from cakeflow.journal.schema import BODIES, FORMAT, Line, upgraded
from cakeflow.storage.atomic import append_line, truncate
from cakeflow.storage.typed import S, Schema, parse_as, read_as

Place = Callable[[int], str]
"""Layer -> name of its edited weight, which format 1 did not write."""


@dataclass(frozen=True)
class Entry:
    """One line of a ledger.

    Attributes:
        number: Place in the ledger, from 0.
        kind: A key of ``BODIES``.
        time: Time of writing (UTC, ISO 8601).
        body: An instance of ``BODIES[kind]``.
        previous: Hash of the entry before; empty in the first one.
        hash: SHA-256 of this entry's line without its hash.
    """

    number: int
    kind: str
    time: str
    body: Schema
    previous: str
    hash: str


class Ledger:
    """A ledger file, to be read and added to.

    A last line without its end was never acknowledged: it is left out, and cut off when the next entry is added.

    Args:
        path: The file; the first entry creates it.
        place: Names the weight of a layer in entries of format 1.

    Raises:
        LedgerError: If an entry is broken, or does not follow the one before.
    """

    def __init__(self, path: Path, place: Place = "layer {}".format) -> None:
        self.path = path
        self.entries = list(read_entries(path, place)) if path.exists() else []
        self._size = self._end(len(self.entries)) if self.entries else 0

    @property
    def head(self) -> str:
        """Hash of the last entry; empty if there is none."""
        return self.entries[-1].hash if self.entries else ""

    def append(self, body: Schema) -> Entry:
        """Add an entry; it is on disk when this returns."""
        kind = next(kind for kind, each in BODIES.items() if each is type(body))
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = Line(number=len(self.entries), kind=kind, time=now, body=body.to_dict(), previous=self.head)
        line = line.model_copy(update={"hash": _hash(line)})
        if self.path.exists() and self.path.stat().st_size > self._size:
            truncate(self.path, self._size)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = canonical(dict(line))
        append_line(self.path, text)
        self.entries.append(_entry(line, body))
        self._size += len(text) + 1
        return self.entries[-1]

    def withdraw(self, count: int) -> None:
        """Cut off the entries after the first ``count``, which were not acknowledged yet."""
        if len(self.entries) > count:
            del self.entries[count:]
            self._size = self._end(count)
            truncate(self.path, self._size)

    def _end(self, count: int) -> int:
        """Return the size in bytes of the first ``count`` lines."""
        return sum(len(line) + 1 for line in whole_lines(self.path)[:count])


def canonical(value: Mapping[str, Any]) -> bytes:
    """Return JSON in one form only: sorted names, no spaces, ASCII; numbers must be finite."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def bodies(entries: Iterable[Entry], kind: type[S]) -> list[S]:
    """Return the bodies of one type, in order."""
    return [entry.body for entry in entries if isinstance(entry.body, kind)]


def read_entries(path: Path, place: Place = "layer {}".format) -> Iterator[Entry]:
    """Yield the entries of a ledger, each checked against its hash and the one before.

    Args:
        path: The file.
        place: Names the weight of a layer in entries of format 1.

    Raises:
        LedgerError: Naming the entry that is broken.
    """
    previous = ""
    for number, text in enumerate(whole_lines(path)):
        where = f"{path}, entry {number}"
        line = parse_as(Line, text, where, LedgerError, REMEDY)
        if fault := _fault(line, text, number, previous):
            raise LedgerError(f"{where}: {fault}; {REMEDY}")
        previous = line.hash
        yield _entry(line, _body(line, place, where))


def whole_lines(path: Path) -> list[bytes]:
    """Return the lines of a ledger that have an end."""
    return path.read_bytes().split(b"\n")[:-1]


REMEDY = "the ledger was changed after it was written; take it from a copy"
OTHER_VERSION = "read the ledger with the version of cakeflow that wrote it"


def _hash(line: Line) -> str:
    return hashlib.sha256(canonical(dict(line) | {"hash": ""})).hexdigest()


def _fault(line: Line, text: bytes, number: int, previous: str) -> str:
    try:
        sound = line.hash == _hash(line) and canonical(dict(line)) == text
    except ValueError:  # NaN, which Python reads from JSON
        sound = False
    if not sound:
        return "its content does not have its hash"
    if line.number != number:
        return f"it says that it is entry {line.number}"
    return "" if line.previous == previous else "it does not follow the entry before"


def _entry(line: Line, body: Schema) -> Entry:
    return Entry(line.number, line.kind, line.time, body, line.previous, line.hash)


def _body(line: Line, place: Place, where: str) -> Schema:
    if line.kind not in BODIES:
        raise LedgerError(f"{where}, kind = {line.kind!r}: expected {', '.join(BODIES)}; {OTHER_VERSION}")
    if (version := line.body.get("format", FORMAT)) not in range(1, FORMAT + 1):
        raise LedgerError(f"{where}, format = {reprlib.repr(version)}: known are 1 to {FORMAT}; {OTHER_VERSION}")
    try:
        body = upgraded(line.kind, line.body, place)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise LedgerError(f"{where}: not a {line.kind} of format 1 ({error!r}); {REMEDY}") from error
    return read_as(BODIES[line.kind], body, where, LedgerError, REMEDY)
