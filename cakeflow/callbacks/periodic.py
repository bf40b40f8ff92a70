"""Base of callbacks that measure the model every few batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning as L
import torch

from cakeflow.data.request import EditRequest
from cakeflow.errors import require_count
from cakeflow.storage.cache import content_key


class PeriodicCallback(L.Callback):
    """Callback that measures the model before the first batch, after every few batches, and after the last one.

    Subclasses override ``measure``, and ``begin`` if they need the facts. Its numbers are logged as ``{name}/...``
    together with ``{name}/edits``, the number of facts edited so far; the step is the number of batches. Those that
    need no run measure in ``cakeflow evaluate`` too, where their numbers are metrics.

    Attributes:
        rows: The logged rows, of all runs so far.
        needs: Number -> fields that a fact must have to be measured (``cakeflow.data.review``).
        in_evaluations: Whether ``measure`` needs nothing but the model and the facts.
        identity: Name of this measurement where callbacks with the same arguments share what they measure of one
            unedited model (``Questions.unedited``); empty shares nothing.

    Args:
        every: Number of batches between measurements; None measures at both ends of a run only.

    Raises:
        ConfigError: If ``every`` is no whole number from 1 on.
    """

    name = "milestone"
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    in_evaluations: ClassVar[bool] = False

    def __init__(self, every: int | None = 1) -> None:
        require_count("every", every, 1, optional=True)
        self.every = every
        self.rows: list[dict[str, float]] = []
        self.identity = ""
        self._requests: Sequence[EditRequest] = ()
        self._last = -1

    def can_measure(self, module: Any) -> bool:
        """Return whether the model is of a kind that is measured; by default any is."""
        return True

    def begin(self, module: Any, requests: Sequence[EditRequest]) -> None:
        """Take the facts that are edited or asked; every request was checked by now."""

    def measure(self, module: Any) -> dict[str, float]:
        """Return numbers about the model as it is now; ``module`` is the edit module."""
        raise NotImplementedError

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Measure the model before the first batch; every request was checked by now."""
        if batch_idx == 0:
            self._last = -1  # a Trainer may run the same callback again
            self._begin(pl_module, trainer.train_dataloader)
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

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Get ready as before a run, where the model is evaluated as it is."""
        if self._evaluates(trainer, pl_module):
            self.on_fit_start(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the model as it is, beside the metrics of an evaluation that belongs to no run."""
        module: Any = pl_module
        if self._evaluates(trainer, module) and self.can_measure(module):
            self._begin(module, trainer.val_dataloaders)
            with module.phase("evaluation"):
                numbers = self.measure(module)
            module.further |= {f"{self.name}/{key}": value for key, value in numbers.items()}

    def _evaluates(self, trainer: L.Trainer, module: Any) -> bool:
        return self.in_evaluations and not trainer.sanity_checking and module.stage == "now"

    def _begin(self, module: Any, batches: Any) -> None:
        """Take the requests of all batches of a data loader, in order."""
        self._requests = [request for batch in batches or () for request in batch.requests]
        self.begin(module, self._requests)

    def _measure(self, trainer: L.Trainer, module: Any) -> None:
        if len(module.journal) == self._last or not self.can_measure(module):
            return
        with module.phase("evaluation"):
            numbers = self._numbers(module)
        self._last = len(module.journal)
        row = {f"{self.name}/{key}": value for key, value in {"edits": float(module.journal.edits), **numbers}.items()}
        lost = {key: math.nan for earlier in self.rows for key in earlier} | row  # unknown if not measured now
        self.rows.append(row)
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in lost.items()})
        for logger in trainer.loggers:  # not module.log, which would date the first row as the batch that follows it
            logger.log_metrics(row, step=trainer.global_step)
            logger.save()

    def _numbers(self, module: Any) -> dict[str, float]:
        """Return ``measure``, from ``module.unedited`` where the same was measured of the same unedited model."""
        if module.unedited is None or not (self.identity and self.in_evaluations) or len(module.journal):
            return self.measure(module)
        key = content_key(self.identity, module.journal.base.fingerprint, list(map(repr, self._requests)))
        if key not in module.unedited:
            module.unedited[key] = self.measure(module)
        numbers: dict[str, float] = module.unedited[key]
        return numbers
