"""Run folders: where a Trainer's is, which folders may become one, and whether the run in one is finished."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import lightning as L

from cakeflow.errors import ConfigError, listed
from cakeflow.journal.ledger import read_entries
from cakeflow.journal.schema import EndBody, EvaluatedRequest
from cakeflow.journal.store import LEDGER
from cakeflow.storage.typed import parse_as


def run_folder(trainer: L.Trainer) -> Path | None:
    """The folder of a Trainer's logger, where it has one: the run folder."""
    return Path(trainer.log_dir) if trainer.log_dir and trainer.loggers else None


def require_run_folder(folder: Path) -> None:
    """Check that a run may write into a folder: a new or empty one, or one of a run or an evaluation.

    Raises:
        ConfigError: If the folder holds other files.
    """
    if folder.is_file():
        raise ConfigError(f"run folder {folder} is a file; choose another one")
    if not (folder / "journal" / LEDGER).exists() and not _is_evaluation(folder):
        files = sorted(str(each.relative_to(folder)) for each in islice(_files(folder), 100))
        if files:
            raise ConfigError(
                f"run folder {folder} holds files that no run wrote ({listed(files, 3)}); choose a new folder, so that "
                "nothing there is written over"
            )


def _files(folder: Path) -> Iterator[Path]:
    return (each for each in folder.rglob("*") if not each.is_dir() or each.is_symlink())


def _is_evaluation(folder: Path) -> bool:
    """True if a folder has the answers of an evaluation without edits."""
    path = folder / "now.jsonl"
    try:
        with path.open("rb") as file:
            parse_as(EvaluatedRequest, file.readline(), str(path), ConfigError, "")
    except (OSError, ConfigError):
        return False
    return True


def is_finished(folder: Path) -> bool:
    """True if a folder holds a run that has ended; what the ledger says of it has hashes of the folder's files."""
    path = folder / "journal" / LEDGER
    return path.exists() and any(isinstance(entry.body, EndBody) for entry in read_entries(path))
