"""What is different on Windows, put in the place of what Linux does, for a test.

Files that are open or mapped cannot be renamed, replaced or deleted, nor the folders that they are in; nothing is
renamed onto a folder; no folder can be opened; text has carriage returns and the encoding cp1252 where nobody says
otherwise; nothing knows of users by number, and ``open`` follows every link.
"""

from __future__ import annotations

import _pyio
import builtins
import io
import locale
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cakeflow.storage import folders

REAL = SimpleNamespace(
    open=os.open, unlink=os.unlink, rename=os.rename, replace=os.replace, isdir=os.path.isdir, text=open
)
MISSING = ("O_NOFOLLOW", "O_DIRECTORY", "fork", "geteuid", "getuid", "getpgid", "killpg")
"""Names that ``os`` does not have there, but for those that the lock of Linux needs."""


def held(path: Any) -> bool:
    """True if this process has a file open or mapped that is this one, or lies in this folder."""
    place = os.path.realpath(path)
    names = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            names.add(str(link.readlink()))
        except OSError:  # the list's own
            continue
    with REAL.text("/proc/self/maps", encoding="utf-8") as maps:
        names |= {parts[5].rstrip("\n") for line in maps if len(parts := line.split(maxsplit=5)) == 6}
    return any(name == place or name.startswith(f"{place}{os.sep}") for name in names)


def refuse(path: Any) -> None:
    """Raise as Windows does if a file is in use."""
    if held(path):
        raise PermissionError(13, "The process cannot access the file because it is being used", str(path))


def opened(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
    """Open a file, no folder."""
    if REAL.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return int(REAL.open(path, flags, *args, **kwargs))


def unlink(path: Any, **kwargs: Any) -> None:
    """Delete a file that nobody has open."""
    refuse(path)
    REAL.unlink(path, **kwargs)


def rename(old: Any, new: Any, **kwargs: Any) -> None:
    """Rename what nobody has open to a name that is free."""
    refuse(old)
    if os.path.lexists(new):
        raise FileExistsError(17, "Cannot create a file when that file already exists", str(new))
    REAL.rename(old, new, **kwargs)


def replace(old: Any, new: Any, **kwargs: Any) -> None:
    """Rename a file onto another that nobody has open."""
    refuse(old)
    refuse(new)
    if REAL.isdir(new):
        raise PermissionError(13, "Access is denied", str(new))
    REAL.replace(old, new, **kwargs)


def behave_as_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put all of it in place until the test ends."""
    for name in MISSING:
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setitem(sys.modules, "pwd", None)
    monkeypatch.setattr(os, "getlogin", lambda: "ann")
    calls = {"open": opened, "unlink": unlink, "remove": unlink, "rename": rename, "replace": replace}
    for name, function in calls.items():
        monkeypatch.setattr(os, name, function)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)
    monkeypatch.setattr(os, "linesep", "\r\n")
    monkeypatch.setattr(locale, "getencoding", lambda: "cp1252")
    monkeypatch.setattr(io, "open", _pyio.open)
    monkeypatch.setattr(builtins, "open", _pyio.open)
    monkeypatch.setattr(folders, "sys", SimpleNamespace(platform="win32"))


def bytes_below(folder: Path) -> dict[str, bytes]:
    """Name -> content of every file below a folder, locks left out."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock")
    }
