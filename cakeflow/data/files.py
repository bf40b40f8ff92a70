"""Text files and JSON, read within bounds: of size, of values, and of what a packed file may become."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from typing_extensions import Buffer

from cakeflow.errors import ConfigError, Fault, RequestError, did_you_mean, listed

SOURCES = (
    "give 'builtin', a .json or .jsonl file (also .gz; of texts, .txt too), an .arrow file, a folder with a data set, "
    "a URL of such a file (http://... or https://...), or a data set of the hub as 'owner/name'"
)
"""End of the messages about sources that cannot be read."""
LARGEST = 1 << 29
"""Most bytes of a file of requests, unpacked: ten times the largest file of the field."""
LARGEST_DOCUMENT = 1 << 26
"""Most bytes of one line of texts."""
MOST_ENTRIES = 1 << 20
"""Most entries of a source of requests, and most JSON objects in one text."""
MOST_VALUES = 1 << 24
"""Most values in a JSON text: each takes up to a hundred bytes of memory, whatever its length in the file."""
MOST_PACKED = 200
"""Most bytes that each byte of a packed file may become; texts become 3 to 30."""
PART = 1 << 16
"""Characters of a text file that are read at once."""

_GZIP = b"\x1f\x8b"


def read_text(path: Path, name: str = "") -> str:
    """Read a text file, unpacked if it is a gzip file, without a byte order mark.

    Args:
        path: The file.
        name: Name of the file in messages; its path by default.

    Raises:
        ConfigError: If there is no such file, it is not UTF-8, or it has more than ``LARGEST`` bytes.
    """
    return "".join(lines(path, name or str(path)))


def parse_json(text: str, name: str, line: int = 1) -> Any:
    """Parse JSON whose objects give no field twice.

    Args:
        text: JSON text.
        name: Name of its file in messages.
        line: Number of its first line in the file.

    Raises:
        RequestError: Naming the broken line.
    """
    try:
        if sum(map(text.count, ",[{")) > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES} values; give it in parts")
        return json.loads(text, object_pairs_hook=_Objects())
    except json.JSONDecodeError as error:
        at = line + error.lineno - 1
        several = "; name a file with one object a line .jsonl" if error.msg == "Extra data" else ""
        remedy = f"broken JSON in {name}, line {at}, column {error.colno}: {error.msg}{several}"
        raise RequestError([Fault(at, "line", text.split("\n")[error.lineno - 1][:80], remedy)]) from error
    except (RecursionError, ValueError) as error:  # nested too deeply, too many digits, a repeated field
        remedy = f"JSON in {name}, line {line} or below, that cannot be read: {error}"
        raise RequestError([Fault(line, "line", text[:80], remedy)]) from error


def exists(path: Path) -> bool:
    """Return whether a file or folder exists; a text that cannot be a path does not."""
    try:
        return path.exists()
    except (OSError, ValueError):  # e.g. requests pasted in place of their file's name
        return False


def lines(path: Path, name: str, *, whole: bool = True) -> Iterator[str]:
    """Lines of a file with their line feeds; limited is the size of the whole file, or of each line."""
    size, encoding, most = 0, "utf-8-sig", LARGEST if whole else LARGEST_DOCUMENT
    with _opened(path, name) as file:
        while line := file.readline(most + 1):
            size = len(line) + size * whole
            if size > most:
                raise ConfigError(f"{name} has more than {most >> 20} MiB of text; give it in parts")
            yield line.decode(encoding)
            encoding = "utf-8"


class Parts:
    """The text of a file, read part by part, with line feeds as Python's text files have them."""

    def __init__(self, path: Path, name: str) -> None:
        _require_file(path)
        self.path, self.name = path, name

    def __iter__(self) -> Iterator[str]:
        with _opened(self.path, self.name) as file, io.TextIOWrapper(file, encoding="utf-8-sig") as text:
            while part := text.read(PART):
                yield part


def _require_file(path: Path) -> None:
    if not exists(path) or not path.is_file():
        raise ConfigError(f"no file or folder {str(path)[:300]!r}{did_you_mean(path, ['builtin'])}; {SOURCES}")


@contextmanager
def _opened(path: Path, name: str) -> Iterator[io.BufferedReader[Any]]:
    """Open a file for reading, unpacked; what cannot be read in the body becomes a ``ConfigError``."""
    _require_file(path)
    try:
        with path.open("rb") as file:
            packed = file.read(len(_GZIP)) == _GZIP  # servers unpack what they send, and people rename files
        with io.BufferedReader(_Unpacked(path, name)) if packed else path.open("rb") as file:
            yield file
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{name} cannot be read as UTF-8 text: {error}; save it as such, or fetch it again"
        ) from error


class _Unpacked(io.RawIOBase):
    """The content of a gzip file, until it turns out to be far larger than a text's would be."""

    def __init__(self, path: Path, name: str) -> None:
        self._file, self._name, self._size = gzip.open(path), name, 0  # noqa: SIM115 (closed with this object)
        self._most = max(LARGEST_DOCUMENT, MOST_PACKED * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        data = self._file.read(len(memoryview(buffer)))
        memoryview(buffer)[: len(data)] = data
        self._size += len(data)
        if self._size > self._most:
            raise ConfigError(f"{self._name} unpacks to {MOST_PACKED} times its size and more; give it unpacked")
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


class _Objects:
    """Builds the objects of a JSON text; of a repeated field, ``json`` would silently take the last value."""

    def __init__(self) -> None:
        self._numbers = count(1)

    def __call__(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if next(self._numbers) > MOST_ENTRIES:
            raise ValueError(f"more than {MOST_ENTRIES} objects; give it in parts")
        fields = dict(pairs)
        if len(fields) < len(pairs):
            raise ValueError(f"one object gives a field twice: {listed([name for name, _ in pairs])}")
        return fields
