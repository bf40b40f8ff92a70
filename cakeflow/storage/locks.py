"""Locks: one process at a time writes a file or a folder, and the others learn who does."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

import psutil
from filelock import BaseFileLock, FileLock, Timeout

from cakeflow.errors import LockedError
from cakeflow.storage.atomic import make_folder

log = logging.getLogger(__name__)


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep a file or folder to this thread while the body runs; the body may lock it again.

    The operating system frees the lock when its process ends, in whatever way. A text beside it names the owner: on
    Windows nobody else can read a locked file.

    Args:
        path: The file or folder; the lock is a hidden file beside it, there as long as it is held.
        wait: Wait until others have freed it, rather than raise.

    Raises:
        LockedError: If another process, or another thread, writes there; its account, host and process id are named.
    """
    make_folder(path.parent)
    lock = FileLock(path.with_name(f".{path.name}.lock"), is_singleton=True)
    if lock.is_locked:
        yield
        return
    owner = path.with_name(f".{path.name}.owner")
    _acquire(lock, path, owner, wait=wait)
    try:
        with suppress(OSError, psutil.Error):  # it only informs
            owner.write_text(_myself(), encoding="utf-8")
        yield
    finally:
        for each in (owner, Path(lock.lock_file)):  # while it is held: a lock of a deleted file is no lock to filelock
            with suppress(OSError):  # Windows deletes no open file
                each.unlink()
        lock.release()


def _acquire(lock: BaseFileLock, path: Path, owner: Path, *, wait: bool) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        try:
            writer = owner.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            writer = ""
        writer = writer or "another process"
        if not wait:
            raise LockedError(
                f"{path} is being written by {writer}; wait until that has ended, or choose another place"
            ) from None
        log.info("waiting for %s, which is being written by %s", path, writer)
        lock.acquire()


def _myself() -> str:
    """Account, host and process, as the system knows them."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return f"{psutil.Process().username()}@{platform.node()}, process {os.getpid()}, since {now}"
