"""Callbacks around edits: they see every layer before its weight is changed, and every batch behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import lightning as L
from jaxtyping import Float
from torch import Tensor

from cakeflow.allocators.base import LayerContext
from cakeflow.forward.tokens import TextBatch
from cakeflow.solvers.problem import LayerProblem, Update

if TYPE_CHECKING:
    from cakeflow.core.locate_then_edit import LocateThenEdit


@dataclass(frozen=True, eq=False)
class LayerEdit:
    """One layer's part in an edit batch.

    Attributes:
        context: The layer. Its linear map, if used now, is linearized at the model as it is now.
        batch: The n facts.
        residual: n x d_out, the residual at the value site before.
        share: n x d_out, the layer's part of it.
        problem: The solver's problem; ``problem.residual`` is the change of the projection's output that makes that
            part, another one where the block multiplies or normalises what the projection writes.
        update: The solver's answer.
    """

    context: LayerContext
    batch: TextBatch
    residual: Float[Tensor, "n d_out"]
    share: Float[Tensor, "n d_out"]
    problem: LayerProblem
    update: Update


class EditCallback(L.Callback):
    """A callback around edits; ``module.log`` works in all of these hooks.

    It observes only: an ``EditError`` that it raises becomes a warning, and the edit goes on. It sees the walk over all
    facts of a batch, not the further ones over those that did not take (``LocateThenEdit(rounds=...)``).
    """

    def on_layer_solved(self, module: LocateThenEdit, edit: LayerEdit) -> None:
        """Called when a layer's update is known; its weight is still as before."""

    def on_batch_edited(self, module: LocateThenEdit, remaining: Float[Tensor, "n d_out"]) -> None:
        """Called when all layers of a batch are changed, with the remaining residual at the last value site."""
