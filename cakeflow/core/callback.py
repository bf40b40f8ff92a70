"""Watching edits from outside: callbacks that are told of every layer, or that measure the model now and then."""

from __future__ import annotations

from dataclasses import dataclass

import lightning as L
from jaxtyping import Float
from torch import Tensor

from cakeflow.allocators import LayerContext
from cakeflow.forward.tokens import EditBatch
from cakeflow.solvers.problem import LayerProblem, Update


@dataclass(frozen=True, eq=False)
class LayerEdit:
    """One layer's part in an edit batch.

    Attributes:
        context: Whose turn it was. Its chain, if used now, is linearised at the model as it is now.
        batch: The n facts.
        missing: n x d_out, what was missing at the value site before.
        problem: What the solver saw; ``problem.residual`` is the share of what was missing.
        update: What it gave.
    """

    context: LayerContext
    batch: EditBatch
    residual: Float[Tensor, "n d_out"]
    problem: LayerProblem
    update: Update


class EditCallback(L.Callback):
    """A callback around edits; ``module.log`` works in all of these hooks.

    It watches only: an ``EditError`` that it raises becomes a warning, and the edit goes on.
    """

    def on_layer_solved(self, module: L.LightningModule, edit: LayerEdit) -> None:
        """A layer's change is known; its weight is still as before."""

    def on_batch_edited(self, module: L.LightningModule, left: Float[Tensor, "n d_out"]) -> None:
        """All layers of a batch are written; ``left`` is still missing at the last turn's value_site."""
