"""Base of callbacks that measure the model every few batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import lightning as L
import torch

from cakeflow.errors import require_count


class PeriodicCallback(L.Callback):
    """Callback that measures the model before the first batch, after every few batches, and after the last one.

    Subclasses override ``measure``. Its numbers are logged as ``{name}/...`` together with ``{name}/edits``, the number
    of facts edited so far; the step is the number of batches.

    Attributes:
        rows: The logged rows, of all runs so far.
        needs: Number -> fields that a fact must have to be measured (``cakeflow.data.review``).

    Args:
        every: Number of batches between measurements; None measures at both ends of a run only.

    Raises:
        ConfigError: If ``every`` is no whole number from 1 on.
    """

    name = "milestone"
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def __init__(self, every: int | None = 1) -> None:
        if every is not None:
            require_count("every", every, 1)
        self.every = every
        self.rows: list[dict[str, float]] = []
        self._last = -1

    def measure(self, module: Any) -> dict[str, float]:
        """Return numbers about the model as it is now; ``module`` is the ``LocateThenEdit``."""
        raise NotImplementedError

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Measure the model before the first batch; every request was checked by now."""
        if batch_idx == 0:
            self._last = -1  # a Trainer may run the same callback again
            self._measure(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Measure after every few batches."""
        if self.every is not None and (batch_idx + 1) % self.every == 0:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure after the last batch, unless that was done."""
        self._measure(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the final change that some solvers make when the run ends."""
        self._measure(trainer, pl_module)

    def _measure(self, trainer: L.Trainer, module: Any) -> None:
        if len(module.journal) == self._last:
            return
        with module.phase("evaluation"):
            numbers = self.measure(module)
        self._last = len(module.journal)
        row = {f"{self.name}/{key}": value for key, value in {"edits": float(module.journal.edits), **numbers}.items()}
        self.rows.append(row)
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in row.items()})
        for logger in trainer.loggers:  # not module.log, which would date the first row as the batch that follows it
            logger.log_metrics(row, step=trainer.global_step)
            logger.save()
