"""Folders that appear whole and replace nothing that nobody checked, and folders that one process claims."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from cakeflow.errors import ConfigError, RunFolderError
from cakeflow.storage.atomic import beside, flush, make_folder, pass_on_rights, uninterrupted
from cakeflow.storage.locks import locked

State = dict[str, tuple[int, int, int]]
"""Path in a folder -> its size, time of change and inode."""


def claim_folder(parent: Path, stem: str) -> int:
    """Make the next folder ``{stem}N`` that is free, for the caller alone, and return N.

    Making it decides whose it is: of several processes that ask at once, each gets another one.
    """
    make_folder(parent)
    numbers = [each.name.removeprefix(stem) for each in parent.iterdir() if each.name.startswith(stem)]
    number = max((int(each) for each in numbers if each.isdecimal()), default=-1) + 1
    while True:
        try:
            (parent / f"{stem}{number}").mkdir()
        except FileExistsError:
            number += 1
        else:
            flush(parent)
            return number


def write_folder(
    path: Path,
    write: Callable[[Path], object],
    *,
    overwrite: bool = False,
    check: Callable[[Path], object] = lambda path: None,
) -> None:
    """Let ``write`` fill a new folder, flush it, then put it into the place of ``path`` in one step.

    What a killed process left of an earlier attempt is cleaned up first.

    Args:
        path: The folder.
        write: Fills the folder that it is called with.
        overwrite: Whether a folder with content is replaced.
        check: Raises if what is at ``path`` may not be replaced.

    Raises:
        ConfigError: If ``path`` exists and may not be overwritten, or it changed while the new folder was filled.
        LockedError: If another process writes this folder.
    """
    with locked(path):
        _clean_up(path)
        before = _state(path)
        check_free(path, overwrite=overwrite)
        check(path)
        fresh = beside(path, "tmp")
        fresh.mkdir()
        try:
            write(fresh)
            pass_on_rights(fresh, fresh.rglob("*"))
            for entry in (*fresh.rglob("*"), fresh):
                flush(entry)
            gc.collect()  # what was read of it may be mapped still, and Windows renames no folder with an open file
            with uninterrupted():
                _put(fresh, path, before)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def check_free(path: Path, *, overwrite: bool) -> None:
    """Check that a folder may be written, e.g. before the work whose result it is for.

    Raises:
        ConfigError: If ``path`` is a file, a mount point, or a folder with content that may not be overwritten.
    """
    if os.path.ismount(path):  # ``Path.is_mount`` raises on Windows before Python 3.12
        raise ConfigError(f"{path} is a mount point, which no folder can replace; choose a folder inside it")
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not overwrite)):
        remedy = "choose another place" if not path.is_dir() else "choose another folder, or overwrite=True"
        raise ConfigError(f"{path} exists already; {remedy}")


def file_name(name: str) -> str:
    r"""Return a name that a file or folder can have on every system, the name itself if it is one.

    Windows takes neither some signs, nor dots and spaces at the end, nor the names of devices.

    Example:
        >>> file_name("facts"), file_name('a/b: "c"?'), file_name("CON"), file_name("..")
        ('facts', 'a_b_ _c__', 'CON_', '__')
    """
    plain = re.sub(r'[<>:"/\\|?*\x00-\x1f]|[. ](?=[. ]*$)', "_", name)
    if plain.startswith("."):
        return plain
    return re.sub(r"^(con|prn|aux|nul|com\d|lpt\d|)(?=\.|$)", r"\1_", plain, flags=re.IGNORECASE)


def require_inside(path: Path, folder: Path) -> Path:
    """Return a path in a folder.

    Raises:
        RunFolderError: If symbolic links lead from it out of the folder.
    """
    if not path.resolve().is_relative_to(folder.resolve()):
        raise RunFolderError(f"{path} leads out of {folder} to {path.resolve()}; put a copy in the place of the link")
    return path


def _put(fresh: Path, path: Path, before: State | None) -> None:
    """Put a folder into its place; ``before`` is the state of what may be replaced, None if there was nothing."""
    try:
        if before is None:
            _move_to_free_place(fresh, path)
        else:
            _replace(fresh, path, before)
    except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        raise _changed(path) from error
    except PermissionError as error:
        raise ConfigError(
            f"{path} cannot be put in its place: {error}; close whatever has a file in it open, or choose another place"
        ) from error
    flush(path.parent)


def _move_to_free_place(fresh: Path, path: Path) -> None:
    if sys.platform != "win32":  # which renames onto nothing; elsewhere an empty folder would be replaced unnoticed
        path.mkdir()
    try:
        fresh.rename(path)
    except OSError as error:
        raise _changed(path) if error.errno == errno.ENOTEMPTY else error from error


def _replace(fresh: Path, path: Path, before: State) -> None:
    """Swap two folders, or swap them back if the one that is replaced is not as it was checked."""
    if _swapped(fresh, path):
        if _state(fresh) != before:
            _swapped(fresh, path)
            raise _changed(path)
        return
    old = beside(path, "old")  # in two steps; killed in between, the next attempt puts the old folder back
    path.rename(old)
    try:
        if _state(old) != before:
            raise _changed(path)
        fresh.rename(path)
    finally:
        if not path.exists():
            old.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _swapped(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False if this system, or its file system, cannot."""
    names, swap = (os.fsencode(one), os.fsencode(other)), 2
    if sys.platform == "linux":
        function, arguments = "renameat2", (-100, names[0], -100, names[1], swap)  # -100: relative to this folder
    elif sys.platform == "darwin":
        function, arguments = "renamex_np", (*names, swap)
    else:
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), function, None)
    if call is None:  # an old C library
        return False
    if call(*arguments) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _state(path: Path) -> State | None:
    """The state of a folder, by which any change of it is noticed; None if there is nothing."""
    if not path.exists():
        return None
    entries = [(each, each.lstat()) for each in sorted(path.rglob("*"))]
    return {str(each.relative_to(path)): (info.st_size, info.st_mtime_ns, info.st_ino) for each, info in entries}


def _clean_up(path: Path) -> None:
    """Delete what killed processes left beside a folder; the old folder returns if it is not in its place."""
    leftover = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}\.(tmp|old)")
    for each in sorted(path.parent.iterdir()):
        if match := leftover.fullmatch(each.name):
            if match[1] == "old" and not path.exists():
                each.rename(path)
            else:
                shutil.rmtree(each, ignore_errors=True)


def _changed(path: Path) -> ConfigError:
    return ConfigError(
        f"{path} changed while it was to be written; nothing of it was touched: look at it, then try again"
    )
