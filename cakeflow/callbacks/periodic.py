"""Callbacks that measure the model every few batches."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from cakeflow.errors import ConfigError


class PeriodicCallback(L.Callback):
    """A callback that measures the unedited model, the model after every few batches, and the final one.

    Subclasses override ``measure``. What it returns is logged as ``{name}/...`` together with ``{name}/edits``, the
    number of facts edited so far; the step is the number of batches. The same rows are kept in ``rows``, where those of
    a further run follow.

    Args:
        every: Batches between measurements.

    Raises:
        ConfigError: If that is less than one.
    """

    name = "milestone"

    def __init__(self, every: int = 1) -> None:
        if every < 1:
            raise ConfigError(f"every must be at least 1 batch, got {every}")
        self.every = every
        self.rows: list[dict[str, float]] = []
        self._seen = -1

    def measure(self, module: Any) -> dict[str, float]:
        """Numbers about the model as it is now; ``module`` is the ``LocateThenEdit``."""
        raise NotImplementedError

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Measure the model as it is, once every request was checked."""
        if batch_idx == 0:
            self._seen = -1  # whatever an earlier run saw
            self._measure(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Measure every few batches."""
        if (batch_idx + 1) % self.every == 0:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure what came after the last time."""
        self._measure(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure what the solver did once, when the run ended."""
        self._measure(trainer, pl_module)

    def _measure(self, trainer: L.Trainer, module: Any) -> None:
        if len(module.journal) == self._seen:
            return
        with module.phase("evaluation"):
            numbers = self.measure(module)
        self._seen = len(module.journal)
        row = {f"{self.name}/{key}": value for key, value in {"edits": float(module.journal.edits), **numbers}.items()}
        self.rows.append(row)
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in row.items()})
        for logger in trainer.loggers:  # not module.log, which would date the first row as the batch that follows it
            logger.log_metrics(row, step=trainer.global_step)
            logger.save()
