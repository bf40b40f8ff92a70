"""The folder of a run: which one it is, how it is claimed, and that one process at a time writes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import CSVLogger

from cakeflow.journal.store import LEDGER
from cakeflow.storage.folders import claim_folder, require_inside
from cakeflow.storage.locks import locked


class RunLogger(CSVLogger):
    """Lightning's CSV logger, whose ``version_N`` is made when it is first asked for and so belongs to one run only."""

    @property
    def version(self) -> int | str:
        """Number or name of the folder."""
        if self._version is None:
            self._version = claim_folder(Path(self.root_dir), "version_")
        return self._version


def run_folder(trainer: L.Trainer) -> Path | None:
    """The folder of a Trainer's logger, where it has one: the run folder."""
    return Path(trainer.log_dir) if trainer.log_dir and trainer.loggers else None


@contextmanager
def writing(trainer: L.Trainer) -> Iterator[Path | None]:
    """Keep a Trainer's run folder to this thread while the body runs; yields the folder, None if there is none.

    Raises:
        LockedError: If another process is writing it.
        RunFolderError: If symbolic links lead out of it.
    """
    folder = run_folder(trainer)
    if folder is None:
        yield None
        return
    for each in folder.rglob("*"):
        require_inside(each, folder)
    with locked(folder / "journal" / LEDGER):
        yield folder
