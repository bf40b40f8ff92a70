"""What a run borrows and gives back, however it ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning as L
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from cakeflow.models.language import LanguageModel


class RestoreState(L.Callback):
    """Gives back what a Trainer changes on its way: training flags, gradients, random states, the answer to Ctrl+C.

    A data loader draws a seed when it is read, ``fit`` drops gradients, a validation that fails leaves the model in
    evaluation mode, and an early interrupt has all later ones ignored. ``LocateThenEdit`` brings this callback along. In
    between the model is in evaluation mode.
    """

    def __init__(self) -> None:
        self._borrowed = ExitStack()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take note, before anything else."""
        lm = getattr(pl_module, "lm", None)  # a model that was given by name is loaded after this
        if isinstance(lm, LanguageModel):
            self._borrowed.enter_context(lm.evaluating())
            self._borrowed.enter_context(_gradients_kept(lm.model))
        self._borrowed.enter_context(isolate_rng())
        self._borrowed.callback(_answer_interrupts, signal.getsignal(signal.SIGINT))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give back at the end of a run."""
        self._borrowed.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give back where a run ends in an error or an interrupt."""
        self._borrowed.close()


def _answer_interrupts(handler: Any) -> None:
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # by Lightning, after an interrupt of the main thread
    if ignored and handler not in (signal.SIG_IGN, None):
        signal.signal(signal.SIGINT, handler)


@contextmanager
def _gradients_kept(model: nn.Module) -> Iterator[None]:
    kept = [(weight, weight.grad) for weight in model.parameters() if weight.grad is not None]
    yield  # left by ``close`` only, never by an error
    for weight, gradient in kept:
        weight.grad = gradient
