"""An append-only ledger: one JSON line per entry, each with the hash of the one before."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import zip_longest
from pathlib import Path
from typing import Any

from cakeflow.errors import LedgerError
from cakeflow.journal.force import out_of_force
from cakeflow.journal.format1 import upgraded
from cakeflow.journal.schema import BODIES, FORMAT, BatchBody, Line, RollbackBody
from cakeflow.ranks import is_first, on_first
from cakeflow.storage.atomic import append_line, truncate, unfinished
from cakeflow.storage.locks import locked
from cakeflow.storage.typed import Json, S, Schema, parse_as, read_as

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

    Every entry is added under a lock, and only if the file is as this ledger saw it last: what another process wrote is
    never cut back. The line of an append that did not end was never acknowledged: it is left out, and cut off when the
    next entry is added. Of several ranks the first one reads and writes the file, and all have its entries.

    Args:
        path: The file; the first entry creates it.
        place: Names the weight of a layer in entries of format 1.

    Raises:
        LedgerError: If an entry is broken, or does not follow the one before.
    """

    def __init__(self, path: Path, place: Place = "layer {}".format) -> None:
        self.path = path
        lines = on_first(lambda: whole_lines(path) if path.exists() else [])
        self.entries = list(_checked(lines, path, place))
        self._size = sum(len(line) + 1 for line in lines)
        self._last = lines[-1] + b"\n" if lines else b""
        self._pending: tuple[Entry, bytes, int] | None = None

    @property
    def head(self) -> str:
        """Hash of the last entry; empty if there is none."""
        return self.entries[-1].hash if self.entries else ""

    def append(self, body: Schema) -> Entry:
        """Add an entry; it is on disk when this returns.

        Raises:
            LedgerError: If the file is not as this ledger saw it last.
            LockedError: If another process is writing it.
        """
        entry = on_first(lambda: self._append(body))
        self.take(entry)
        return entry

    def take(self, entry: Entry) -> None:
        """Have an entry that the first rank wrote."""
        if not is_first():
            self.entries[entry.number :] = [entry]

    def _append(self, body: Schema) -> Entry:
        with locked(self.path):
            self.settle()
            self.require_unchanged()
            kind = next(kind for kind, each in BODIES.items() if each is type(body))
            now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
            line = Line(number=len(self.entries), kind=kind, time=now, body=body.to_dict(), previous=self.head)
            line = line.model_copy(update={"hash": _hash(line)})
            text = canonical(dict(line))
            self._pending = _entry(line, body), text + b"\n", self._size
            append_line(self.path, text)
            self.settle()
        return self.entries[-1]

    def settled(self) -> Entry | None:
        """Return the last entry on disk."""
        self.settle()
        return self.entries[-1] if self.entries else None

    def settle(self) -> None:
        """Take in the last append if it reached the disk: an exception may have come before it was noted here."""
        if self._pending:
            entry, text, start = self._pending
            if _bytes_from(self.path, start) == text:
                self.entries[entry.number :] = [entry]
                self._size, self._last = start + len(text), text
        self._pending = None

    def require_unchanged(self) -> None:
        """Compare the file with what is known of it, and cut off an append that did not end; for holders of the lock.

        Raises:
            LedgerError: If another process has continued or changed it.
        """
        expected = self._last
        content = _bytes_from(self.path, self._size - len(expected))
        tail = content.removeprefix(expected)
        if not content.startswith(expected) or (tail and (b"\n" in tail or unfinished(self.path) != self._size)):
            raise LedgerError(
                f"{self.path} was continued or changed by another process after entry {len(self.entries) - 1}; nothing "
                "was written: load the run again and go on from there"
            )
        if tail:
            truncate(self.path, self._size)


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
    yield from _checked(whole_lines(path), path, place)


def _checked(lines: Sequence[bytes], path: Path, place: Place) -> Iterator[Entry]:
    previous = ""
    for number, text in enumerate(lines):
        where = f"{path}, entry {number}"
        line = parse_as(Line, text, where, LedgerError, REMEDY)
        if fault := _fault(line, text, number, previous):
            raise LedgerError(f"{where}: {fault}; {REMEDY}")
        previous = line.hash
        yield _entry(line, _body(line, place, where))


def whole_lines(path: Path) -> list[bytes]:
    """Return the lines of a ledger, without one whose append has not ended.

    Raises:
        LedgerError: If the last line was whole once and is cut off: what it said may have been acknowledged.
    """
    data = path.read_bytes()
    *lines, tail = data.split(b"\n")
    start = len(data) - len(tail)
    if tail and unfinished(path) != start and _bytes_from(path, start) == tail:  # not written on meanwhile
        raise LedgerError(f"{path}, entry {len(lines)}: cut off after it was written; take the ledger from a copy")
    return lines


def _bytes_from(path: Path, start: int) -> bytes:
    """The content of a file from an offset on; nothing if there is no file."""
    if not path.exists():
        return b""
    with path.open("rb") as file:
        file.seek(start)
        return file.read()


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


def taken_back(entries: Iterable[Entry]) -> tuple[dict[int, Entry], dict[tuple[int, str], Entry]]:
    """Return what was taken back: batches by number, and facts by batch and hash, each with the entry that did it."""
    batches: dict[int, Entry] = {}
    facts: dict[tuple[int, str], Entry] = {}
    for entry in entries:
        if isinstance(entry.body, RollbackBody):
            batches |= dict.fromkeys(entry.body.batches, entry)
        elif isinstance(entry.body, BatchBody) and entry.body.undoes is not None:
            facts |= {(entry.body.undoes, each): entry for each in entry.body.undone}
    return batches, {each: entry for each, entry in facts.items() if _number(entry) not in batches}


def requests_in_force(entries: Sequence[Entry]) -> list[dict[str, Json]]:
    """Return the requests on record that were neither taken back nor replaced, as far as their texts were stored."""
    batches, facts = taken_back(entries)
    own = [body for body in bodies(entries, BatchBody) if body.batch not in batches]
    gone = out_of_force([(body.batch, body.hashes, body.replaced) for body in own], facts)
    rows = [
        (*row, names) for body, names in zip(own, gone, strict=True) for row in zip_longest(body.hashes, body.requests)
    ]
    return [request for each, request, names in rows if request is not None and each not in names]


def _number(entry: Entry) -> int:
    return entry.body.batch if isinstance(entry.body, BatchBody) else -1
