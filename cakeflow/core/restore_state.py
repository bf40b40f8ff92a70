"""A callback that restores what a Trainer changes, however a run ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning as L
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from cakeflow.core.folder import writing
from cakeflow.core.strategy import join
from cakeflow.models.base import EditableModel


class RestoreState(L.Callback):
    """Restores what ``Trainer.fit`` changes: training flags, gradients, random states and the SIGINT handler.

    Data loaders draw seeds, ``fit`` drops gradients, a failed validation leaves the model in evaluation mode, and after
    an interrupt Lightning ignores all later ones. During a run its ranks work together, the model is in evaluation
    mode, and no other process writes the run folder. Every ``EditModule`` adds this callback to its Trainer.
    """

    def __init__(self) -> None:
        self._state = ExitStack()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Store the state, before anything else of a run."""
        self._state.enter_context(join(trainer))
        lm = getattr(pl_module, "lm", None)  # a model named by a string is loaded later
        if isinstance(lm, EditableModel):
            self._state.enter_context(lm.evaluating())
            self._state.enter_context(_restoring_gradients(lm.model))
        if stage == "fit":
            self._state.enter_context(writing(trainer))
        self._state.enter_context(isolate_rng())
        self._state.callback(_restore_handler, signal.getsignal(signal.SIGINT))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the state at the end of a run."""
        self._state.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restore the state after an error or an interrupt."""
        self._state.close()


def _restore_handler(handler: Any) -> None:
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # set by Lightning after the first interrupt
    if ignored and handler not in (signal.SIG_IGN, None):
        signal.signal(signal.SIGINT, handler)


@contextmanager
def _restoring_gradients(model: nn.Module) -> Iterator[None]:
    gradients = [(weight, weight.grad) for weight in model.parameters() if weight.grad is not None]
    yield  # ends by ``close`` only, never by an error: no ``finally`` is needed
    for weight, gradient in gradients:
        weight.grad = gradient
