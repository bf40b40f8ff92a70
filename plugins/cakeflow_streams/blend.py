"""Facts that miss much are moved a part of the way only, as far as their targets' likelihood says."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow import LayerProblem, LeastSquares, Solver, Update
from cakeflow.errors import ConfigError, NumericalError, ShapeError, require_positive
from cakeflow_streams.rank import price

STEPS = 10
"""T: candidate t leaves ``(T - t) / 2T`` of a far fact's residual away, half of it at t = 0 and nothing at t = T."""


@dataclass(frozen=True)
class ResidualBlend(Solver):
    """``inner``, with a part of the residual for facts that are far from their target (AlphaEdit+, official code).

    A fact is far if its whole gap ``|z - h|`` exceeds the radius. The inner solver sees the full residual once; D is
    linear in it, so the eleven candidates scale rows of its factor. A layer's candidate is chosen with the weights of
    the other layers as they are. A problem without a gap, where facts are undone, is left to ``inner``.

    The official code chooses by the accuracy on the evaluation's own records, and the first of equal candidates, which
    halves the edit where all are equal. Here nothing of an evaluation is seen, and the last of equals is taken.

    Attributes:
        inner: A solver whose update has the residual as a factor.
        radius: In units of the hidden states of the model: 30 in the official configs of GPT2-XL and GPT-J, less than
            any gap on SmolLM2. A problem does not know the state before the edit, which could make it relative.
        choose: ``loss`` takes the candidate under which the facts' own targets are most likely on their bare prompts; a
            number from 0 to 10 is t itself.
    """

    matrices = 4
    inner: Solver = field(default_factory=LeastSquares)
    radius: float = 30.0
    choose: Literal["loss"] | int = "loss"

    def __post_init__(self) -> None:
        require_positive("ResidualBlend", self, "radius")
        if self.choose != "loss" and self.choose not in range(STEPS + 1):
            raise ConfigError(f"ResidualBlend.choose must be 'loss' or 0 to {STEPS}, got {self.choose!r}")

    def solve(self, problem: LayerProblem) -> Update:
        """Solve by ``inner``, and scale the residuals of the facts that are far."""
        update = self.inner.solve(problem)
        if problem.gap is None:
            return update
        if update.left is None or not update.is_plain or update.deferred is not None:
            raise ConfigError(f"{self.inner!r} gives no plain factors; put ResidualBlend inside it instead")
        parts = shares(problem.gap, self.radius)
        chosen = len(parts) - 1
        if len(parts) > 1:
            chosen = self._by_loss(problem, update, parts) if self.choose == "loss" else int(self.choose)
        numbers = update.numbers | {"residual_share": float(parts[chosen].min())}
        update = replace(update, left=update.left * parts[chosen][:, None], is_plain=False, numbers=numbers)
        if "price" in numbers and problem.covariance is not None:  # the inner one is that of the whole residual
            numbers["price"] = price(update, problem.covariance)
        return update

    def _by_loss(self, problem: LayerProblem, update: Update, parts: Float[Tensor, "steps n"]) -> int:
        """Return the candidate of least loss, the last one of equals."""
        if problem.loss is None or update.left is None:
            raise ShapeError("ResidualBlend with choose='loss' needs the model's loss; the problem has none")
        losses = [problem.loss(update.left.mul(part[:, None]).T @ update.right)[0] for part in parts]
        if not all(map(math.isfinite, losses)):
            raise NumericalError(f"ResidualBlend: a candidate's loss is not finite, {losses}; raise ridge")
        return max(range(len(losses)), key=lambda t: (-losses[t], t))


def shares(gap: Float[Tensor, "n d_out"], radius: float) -> Float[Tensor, "steps n"]:
    """Return the share of its residual that each fact gets under each candidate; one candidate if no fact is far.

    Example:
        >>> import torch
        >>> shares(torch.tensor([[3.0, 4.0], [1.0, 0.0]]).double(), radius=4.0)[[0, 6, 10]].tolist()
        [[0.5, 1.0], [0.8, 1.0], [1.0, 1.0]]
        >>> shares(torch.tensor([[3.0, 4.0]]), radius=5.0).tolist()
        [[1.0]]
    """
    far = gap.norm(dim=1) > radius
    away = torch.arange(STEPS, -1, -1, device=gap.device, dtype=gap.dtype) / (2 * STEPS)
    result: Tensor = 1 - (away if bool(far.any()) else away[STEPS:])[:, None] * far
    return result
