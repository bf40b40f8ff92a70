"""Masking of a change: only entries that are large relative to the weight stay."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow import LayerProblem, LeastSquares, Solver, Update
from cakeflow.errors import ConfigError

EPSILON = 1e-8
"""Added to the signed weight before dividing by it, as in the official code."""


@dataclass(frozen=True)
class Rect(Solver):
    """The inner change where ``|D / W|`` is largest, 0 elsewhere (RECT, Gu et al. 2024, eq. 4).

    Attributes:
        inner: Any solver.
        keep: Share of the entries that stay: 0.4 in AlphaEdit's and BLUE's repositories, 0.2 in the original.
        in_loop: Mask each layer's change before the next layer is solved. The official code masks when all layers are
            done, so that later layers compensate for changes that are then masked.
    """

    matrices = 5
    inner: Solver = field(default_factory=LeastSquares)
    keep: float = 0.4
    in_loop: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ConfigError(f"Rect: keep must lie in (0, 1], got {self.keep}")

    def solve(self, problem: LayerProblem) -> Update:
        """Mask the change of ``inner``, at once or deferred until all layers are written."""
        update = self.inner.solve(problem)
        change = update.dense
        masked = Update(change * largest(change / (problem.weight.double() + EPSILON), self.keep))
        return masked if self.in_loop else replace(update, deferred=masked)


def largest(values: Float[Tensor, "rows columns"], keep: float) -> Tensor:
    """Return the mask of the share ``keep`` of largest magnitudes; the least of them is the official ``kthvalue``.

    Example:
        >>> import torch
        >>> largest(torch.tensor([[1.0, -4.0], [3.0, 2.0]]), 0.5).int().tolist()
        [[0, 1], [1, 1]]
    """
    magnitude = values.abs()
    rank = int(magnitude.numel() - magnitude.numel() * keep)
    return magnitude >= (magnitude.flatten().kthvalue(rank).values if rank else -torch.inf)
