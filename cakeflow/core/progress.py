"""The progress bars of a run: facts edited, and requests asked."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ProgressBar

from cakeflow.forward.progress import progress_bar


class EditProgressBar(ProgressBar):
    """Counts facts, batch by batch. Where there is one batch only, the bars of its phases say more, and stand alone."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bars: dict[str, Any] = {}

    def enable(self) -> None:
        """Show bars."""
        self._enabled = True

    def disable(self) -> None:
        """Show none: Lightning calls it in all processes but the first."""
        self._enabled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count the facts that are edited."""
        self._open("edit", "editing", trainer, trainer.num_training_batches)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the facts of a batch."""
        self._bars["edit"].update(len(batch))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count the requests that are asked."""
        title = f"evaluating ({getattr(pl_module, 'stage', 'now')})"
        self._open("ask", title, trainer, sum(trainer.num_val_batches))

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the requests of a batch."""
        self._bars["ask"].update(len(batch))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End an evaluation."""
        self._bars.pop("ask").close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave no bar on the terminal."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave no bar on the terminal."""
        self._close()

    def _open(self, name: str, title: str, trainer: L.Trainer, batches: float) -> None:
        total = len(trainer.datamodule.requests)  # type: ignore[attr-defined]
        self._bars[name] = progress_bar(total, title, "fact", enabled=self._enabled and batches > 1)

    def _close(self) -> None:
        while self._bars:
            self._bars.popitem()[1].close()


def with_progress_bar(callbacks: Any, enabled: bool | None) -> list[Callback]:
    """The user's callbacks, and a progress bar of ours unless there is one."""
    chosen = as_list(callbacks)
    if enabled is not False and not any(isinstance(callback, ProgressBar) for callback in chosen):
        chosen.append(EditProgressBar())
    return chosen


def as_list(callbacks: Any) -> list[Callback]:
    """The callbacks that a Trainer takes as one, as a list or as None."""
    return [callbacks] if isinstance(callbacks, Callback) else list(callbacks or [])
