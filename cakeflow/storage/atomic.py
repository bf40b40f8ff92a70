"""Writing files so that readers see the old content or the new one, never half of it, and so that it lasts.

``sys.audit`` events named ``cakeflow.files`` mark the moments between which a crash could fall; tests stop there.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from safetensors.torch import save_file
from torch import Tensor

from cakeflow.errors import ConfigError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to disk, then rename it and flush the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        sys.audit("cakeflow.files", "written", path.name)
        _flush(temporary)
        sys.audit("cakeflow.files", "flushed", path.name)
        temporary.replace(path)
        sys.audit("cakeflow.files", "renamed", path.name)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file whole."""
    ready = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}  # none share memory
    write_whole(path, lambda temporary: save_file(ready, temporary, dict(metadata or {})))


def write_folder(path: Path, write: Callable[[Path], object], *, overwrite: bool = False) -> None:
    """Let ``write`` fill a new folder, flush it, then put it in the place of ``path``.

    Raises:
        ConfigError: If there is something at ``path`` already and it is not to be overwritten.
    """
    check_free(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    fresh.mkdir()
    try:
        write(fresh)
        for found in fresh.rglob("*"):
            _flush(found)
        _flush(fresh)
        if path.exists():
            path.rename(old)
        fresh.rename(path)
        _flush(path.parent)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for left in (fresh, old):
            shutil.rmtree(left, ignore_errors=True)


def check_free(path: Path, *, overwrite: bool) -> None:
    """Whether a folder may be written; to be asked before the work, too.

    Raises:
        ConfigError: If something is there that is not to be overwritten, or is no folder.
    """
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not overwrite)):
        remedy = "choose another place" if not path.is_dir() else "choose another folder, or overwrite=True"
        raise ConfigError(f"{path} exists already; {remedy}")


def append_line(path: Path, line: bytes) -> None:
    """Add a line to a file and flush it to disk; if that fails, the file is as before.

    A process that is killed meanwhile may leave a line without its end: readers must leave out such a tail.
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


def cut(path: Path, size: int) -> None:
    """Cut a file down to its first bytes."""
    with path.open("rb+") as file:
        file.truncate(size)
        os.fsync(file.fileno())


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C until the body has ended, so that it cannot fall between two steps that belong together."""
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if held:
        usual(*held[0])


def _flush(path: Path) -> None:
    """Have the system write a file, or a folder's names, to disk; not every system does so for folders."""
    folder = path.is_dir()
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError:
        if not folder:
            raise
    finally:
        os.close(descriptor)
