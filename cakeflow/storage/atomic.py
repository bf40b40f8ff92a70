"""Atomic and durable writes: readers see the old content or the new one, and a crash loses neither.

``sys.audit`` events named ``cakeflow.files`` mark the moments between which a crash could fall; tests stop there.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from safetensors.torch import save_file
from torch import Tensor

from cakeflow.errors import ConfigError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to disk, then rename it and flush the folder.

    The order matters: renamed before it is flushed, a file could be empty after a power cut.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        _narrow(temporary)
        sys.audit("cakeflow.files", "written", path.name)
        _flush(temporary)
        sys.audit("cakeflow.files", "flushed", path.name)
        temporary.replace(path)
        sys.audit("cakeflow.files", "renamed", path.name)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    # safetensors refuses tensors that share memory, so each is copied
    ready = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    write_whole(path, lambda temporary: save_file(ready, temporary, dict(metadata or {})))


def write_folder(path: Path, write: Callable[[Path], object], *, overwrite: bool = False) -> None:
    """Let ``write`` fill a new folder, flush it, then move it to ``path``; the old folder stays until that is done.

    Raises:
        ConfigError: If ``path`` exists and may not be overwritten.
    """
    check_free(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    fresh.mkdir()
    try:
        write(fresh)
        pass_on_rights(fresh, fresh.rglob("*"))
        for entry in fresh.rglob("*"):
            _flush(entry)
        _flush(fresh)
        if path.exists():
            path.rename(old)
        fresh.rename(path)
        _flush(path.parent)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for folder in (fresh, old):
            shutil.rmtree(folder, ignore_errors=True)


def check_free(path: Path, *, overwrite: bool) -> None:
    """Check that a folder may be written, e.g. before the work whose result it is for.

    Raises:
        ConfigError: If ``path`` is a file, a mount point, or a folder with content that may not be overwritten.
    """
    if path.is_mount():
        raise ConfigError(f"{path} is a mount point, which no folder can replace; choose a folder inside it")
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not overwrite)):
        remedy = "choose another place" if not path.is_dir() else "choose another folder, or overwrite=True"
        raise ConfigError(f"{path} exists already; {remedy}")


def make_private(folder: Path) -> None:
    """Make a folder that only its owner can open, or an empty one so; one that has content keeps its rights."""
    folder.mkdir(parents=True, exist_ok=True)
    if all(each.name.startswith(".") for each in folder.rglob("*") if each.is_file()):  # locks
        with suppress(OSError):  # a file system without rights, or another's folder
            folder.chmod(0o700)


def pass_on_rights(folder: Path, paths: Iterable[Path]) -> None:
    """Give files and folders the rights of the folder that they are in; files cannot be executed."""
    mode = folder.stat().st_mode & 0o777
    for path in paths:
        with suppress(OSError):
            path.chmod(mode if path.is_dir() else mode & 0o666)


def _narrow(path: Path) -> None:
    """Take from a file what its folder does not allow either."""
    with suppress(OSError):
        path.chmod(path.stat().st_mode & path.parent.stat().st_mode & 0o777)


def append_line(path: Path, line: bytes) -> None:
    """Append a line to a file and flush it to disk; if that fails, the file is as before.

    A process that is killed meanwhile may leave an unfinished last line, which readers must ignore.
    """
    fresh = not path.exists()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        try:
            sys.audit("cakeflow.files", "append", path.name)
            rest = line + b"\n"
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            sys.audit("cakeflow.files", "appended", path.name)
            os.fsync(descriptor)
        except BaseException:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)
    if fresh:
        _flush(path.parent)


def truncate(path: Path, size: int) -> None:
    """Shorten a file to its first ``size`` bytes and flush it to disk."""
    with path.open("rb+") as file:
        file.truncate(size)
        os.fsync(file.fileno())


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C until the body has ended, so that it cannot fall between two steps that belong together."""
    usual = signal.getsignal(signal.SIGINT)
    # only the main thread may set handlers; SIG_IGN, SIG_DFL and None are left as they are
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield
        return
    interrupts: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: interrupts.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if interrupts:
        usual(*interrupts[0])


def _flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk; systems that cannot do so for folders are forgiven."""
    folder = path.is_dir()
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError:
        if not folder:
            raise
    finally:
        os.close(descriptor)
