"""Loggers beside the run folder: W&B, MLflow and others get settings and files; the folder is always ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from cakeflow.core.folder import RunLogger

LONGEST = 250
"""Characters of a setting that trackers take."""


def has_folder(logger: object) -> bool:
    """True for a logger that keeps a run in a folder of its own."""
    return isinstance(logger, (CSVLogger, TensorBoardLogger))


def names_folder(logger: object) -> bool:
    """True for the ``logger`` of a Trainer's arguments if it leaves no run folder to be named: it has one, or none."""
    if isinstance(logger, (bool, type(None))):
        return logger is False
    return any(map(has_folder, logger if isinstance(logger, (list, tuple)) else [logger]))


def with_run_folder(trainer: L.Trainer, make: Callable[[], CSVLogger] | None = None) -> L.Trainer:
    """Give a Trainer whose loggers keep no folder one for its run, and put the logger that has it first.

    A tracker's ``save_dir`` is no run folder: it may be the working directory, common to all runs, or none at all.

    Args:
        trainer: The Trainer; without any logger it stays so.
        make: Makes the logger of the run folder; by default ``runs/cakeflow/version_N``.
    """
    loggers = list(trainer.loggers)
    if loggers and not any(map(has_folder, loggers)):
        loggers = [make() if make else RunLogger("runs", name="cakeflow"), *loggers]
    trainer.loggers = sorted(loggers, key=lambda logger: not has_folder(logger))
    return trainer


def log_settings(trainer: L.Trainer, settings: Mapping[str, Any]) -> None:
    """Log what decides a run as hyperparameters; the folder of a ``CSVLogger`` has them in its ledger.

    Args:
        trainer: The run's Trainer.
        settings: Name -> value; texts are cut to what trackers take.
    """
    plain = {
        name: value if isinstance(value, (int, float)) else str(value)[:LONGEST] for name, value in settings.items()
    }
    for logger in trainer.loggers:
        if not isinstance(logger, CSVLogger):
            logger.log_hyperparams(plain)


def log_files(trainer: L.Trainer, folder: Path) -> None:
    """Hand the files of a finished run to trackers that keep artifacts.

    Args:
        trainer: The run's Trainer.
        folder: The run folder.
    """
    for logger in trainer.loggers:
        _log_files(logger, folder)


def _log_files(logger: Logger, folder: Path) -> None:
    if isinstance(logger, MLFlowLogger):
        logger.experiment.log_artifacts(logger.run_id, str(folder), folder.name)
    elif isinstance(logger, WandbLogger):
        import wandb

        artifact = wandb.Artifact(f"{logger.experiment.id}-{folder.name}", type="run")
        artifact.add_dir(str(folder))
        logger.experiment.log_artifact(artifact)
