"""Atomic and durable writes: readers see the old content or the new one, and a crash loses neither.

``sys.audit`` events named ``cakeflow.files`` mark the moments between which a crash could fall; tests stop there.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing, and flush their names to disk."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in missing:
        flush(each.parent)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to disk, then rename it and flush the folder.

    The order matters: renamed before it is flushed, a file could be empty after a power cut.
    """
    make_folder(path.parent)
    temporary = beside(path, "tmp")
    try:
        write(temporary)
        _narrow(temporary)
        sys.audit("cakeflow.files", "written", path.name)
        flush(temporary)
        sys.audit("cakeflow.files", "flushed", path.name)
        _put(temporary, path)
        sys.audit("cakeflow.files", "renamed", path.name)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _put(temporary: Path, path: Path) -> None:
    """Rename a file onto another; Windows refuses that while somebody reads the other one, so try for two seconds."""
    for wait in (0.05, 0.15, 0.3, 0.5, 1.0):
        with suppress(PermissionError):
            temporary.replace(path)
            return
        time.sleep(wait)
    temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: UTF-8, with the same bytes on every system."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically; equal tensors and texts give equal bytes."""
    # safetensors refuses tensors that share memory, so each is copied
    ready = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    notes = dict(metadata or {}) if ready or metadata else None  # safetensors cannot read a file of neither

    def write(temporary: Path) -> None:
        save_file(ready, temporary, notes)
        _sort_header(temporary)

    write_whole(path, write)


def _sort_header(path: Path) -> None:
    """Sort the texts in the header of a safetensors file, which each process writes in an order of its own."""
    with path.open("rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if "__metadata__" not in header:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # or the texts have signs that JSON can write in several ways
            file.seek(8)
            file.write(text.ljust(size))


def make_private(folder: Path) -> None:
    """Make a folder that only its owner can open, or an empty one so; one that has content keeps its rights."""
    folder.mkdir(parents=True, exist_ok=True)
    if all(each.name.startswith(".") for each in folder.rglob("*") if each.is_file()):  # locks
        with suppress(OSError):  # a file system without rights, or another's folder
            folder.chmod(0o700)


def pass_on_rights(folder: Path, paths: Iterable[Path]) -> None:
    """Give files and folders the rights of the folder that they are in; files cannot be executed, links are left."""
    mode = folder.stat().st_mode & 0o777
    for path in (each for each in paths if not each.is_symlink()):
        with suppress(OSError):
            path.chmod(mode if path.is_dir() else mode & 0o666)


def _narrow(path: Path) -> None:
    """Take from a file what its folder does not allow either."""
    with suppress(OSError):
        path.chmod(path.stat().st_mode & path.parent.stat().st_mode & 0o777)


def append_line(path: Path, line: bytes) -> None:
    """Append a line to a file and flush it to disk; if that fails, the file is as before.

    A process that is killed meanwhile may leave an unfinished last line; ``unfinished`` tells where it begins.
    """
    own = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)  # without the latter Windows adds carriage returns
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | own, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        marker = _marker(path)
        marker.write_text(str(size))
        flush(marker)
        flush(path.parent)
        try:
            sys.audit("cakeflow.files", "append", path.name)
            rest = line + b"\n"
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            sys.audit("cakeflow.files", "appended", path.name)
            os.fsync(descriptor)
        except BaseException:
            os.ftruncate(descriptor, size)
            marker.unlink(missing_ok=True)
            raise
        marker.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def unfinished(path: Path) -> int | None:
    """Offset of an append to a file that has not ended, or never did; None if every append has."""
    try:
        return int(_marker(path).read_text())
    except (OSError, ValueError):
        return None


def _marker(path: Path) -> Path:
    """The file that is there while a line is appended."""
    return path.with_name(f".{path.name}.append")


def truncate(path: Path, size: int) -> None:
    """Shorten a file to its first ``size`` bytes and flush it to disk."""
    with path.open("rb+") as file:
        file.truncate(size)
        os.fsync(file.fileno())


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay the handlers of all signals until the body has ended.

    What they raise (Ctrl-C, the alarm of a time-out) cannot fall between two steps that belong together.
    """
    if threading.current_thread() is not threading.main_thread():  # handlers run in the main thread only
        yield
        return
    usual = {int(number): each for number in signal.valid_signals() if callable(each := signal.getsignal(number))}
    late: list[tuple[int, FrameType | None]] = []
    with ExitStack() as ends:  # which calls all that it has, whatever one of them raises
        ends.callback(_call_handlers, usual, late)
        for number, handler in usual.items():
            ends.callback(signal.signal, number, handler)
            signal.signal(number, lambda number, frame: late.append((number, frame)))
        yield


def _call_handlers(handlers: Mapping[int, Any], signals: list[tuple[int, FrameType | None]]) -> None:
    with ExitStack() as calls:
        for number, frame in reversed(signals):
            calls.callback(handlers[number], number, frame)


def beside(path: Path, kind: str) -> Path:
    """A hidden name beside a path that no other process, here or on another host, comes upon."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.{kind}")


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk; systems that cannot do so for folders are forgiven."""
    folder = path.is_dir()
    with suppress(OSError) if folder else nullcontext():  # Windows opens no folder at all
        descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
