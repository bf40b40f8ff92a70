"""Run folders: where a Trainer's is, how it is claimed and locked, what may become one, and whether it is finished."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import CSVLogger

from cakeflow import ranks
from cakeflow.errors import ConfigError, listed
from cakeflow.journal.ledger import read_entries
from cakeflow.journal.schema import EndBody, EvaluatedRequest
from cakeflow.journal.store import LEDGER, ledger_path
from cakeflow.storage.folders import claim_folder, require_inside
from cakeflow.storage.locks import locked
from cakeflow.storage.typed import parse_as


class RunLogger(CSVLogger):
    """Lightning's CSV logger, whose ``version_N`` is made when it is first asked for and so belongs to one run only."""

    @property
    def version(self) -> int | str:
        """Number or name of the folder."""
        if self._version is None:
            self._version = ranks.on_first(lambda: claim_folder(Path(self.root_dir), "version_"))
        return self._version


def run_folder(trainer: L.Trainer) -> Path | None:
    """The folder of a Trainer's logger, where it has one: the run folder."""
    return Path(trainer.log_dir) if trainer.log_dir and trainer.loggers else None


@contextmanager
def writing(trainer: L.Trainer) -> Iterator[Path | None]:
    """Keep a Trainer's run folder to this thread while the body runs; yields the folder, None if there is none.

    Of several ranks the first one holds it for all of them.

    Raises:
        LockedError: If another process is writing it.
        RunFolderError: If symbolic links lead out of it.
    """
    folder = run_folder(trainer)
    if folder is None:
        yield None
        return
    with ExitStack() as locks:
        ranks.on_first(lambda: _enter(locks, folder))
        yield folder


def _enter(locks: ExitStack, folder: Path) -> None:
    """Lock a run folder until ``locks`` is closed."""
    for each in folder.rglob("*"):
        require_inside(each, folder)
    locks.enter_context(locked(ledger_path(folder)))


def require_run_folder(folder: Path) -> None:
    """Check that a run may write into a folder: a new or empty one, or one of a run or an evaluation.

    Raises:
        ConfigError: If the folder holds other files.
    """
    ranks.on_first(lambda: _require_run_folder(folder))


def _require_run_folder(folder: Path) -> None:
    if folder.is_file():
        raise ConfigError(f"run folder {folder} is a file; choose another one")
    if not ledger_path(folder).exists() and not _is_evaluation(folder):
        files = sorted(str(each.relative_to(folder)) for each in islice(_files(folder), 100))
        if files:
            raise ConfigError(
                f"run folder {folder} holds files that no run wrote ({listed(files, 3)}); choose a new folder, so that "
                "nothing there is written over"
            )


def check_run_folder(trainer: L.Trainer) -> None:
    """Check a Trainer's run folder; an evaluation logs nothing where a finished run is.

    Raises:
        ConfigError: If the folder holds other files.
    """
    if (folder := run_folder(trainer)) is not None:
        require_run_folder(folder)
        if not trainer.training and is_finished(folder):
            trainer.loggers = []
            warnings.warn(f"{folder} holds a finished run, which stays as it is: nothing is logged there", stacklevel=3)


def _files(folder: Path) -> Iterator[Path]:
    """Files and links in a folder, but for the hidden ones beside a ledger: its lock, its owner, an append's mark."""
    files = (each for each in folder.rglob("*") if not each.is_dir() or each.is_symlink())
    return (each for each in files if not each.name.startswith(f".{LEDGER}."))


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
    path = ledger_path(folder)
    return ranks.on_first(
        lambda: path.exists() and any(isinstance(entry.body, EndBody) for entry in read_entries(path))
    )
