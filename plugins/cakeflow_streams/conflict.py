"""Weights of earlier keys: one that a new key resembles need not keep its value."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow import LayerProblem, LeastSquares, Solver, Update
from cakeflow.errors import require_positive


@dataclass(frozen=True)
class ConflictHistory(Solver):
    """``inner`` with every earlier key j counted ``c Lambda_j`` times (AlphaEdit+, Liu et al. 2026, official code).

    Lambda_j is 1 less the largest absolute cosine of the key and a new one, so that it is 0 for a key that comes again
    and 1 for one that is orthogonal to all new ones. It belongs to the batch: one new key frees an old one for all.
    The cosines are those of the keys as they are, so this wrapper stands outside any that projects them.

    Attributes:
        inner: Any solver that preserves the problem's history.
        weight: beta, the times that a key without conflict counts; 100 in the official configs.
        by_depth: Whether c is beta times the position of the layer among the edited ones, from 1, as in the official
            code, or beta in all of them.
    """

    inner: Solver = field(default_factory=LeastSquares)
    weight: float = 100.0
    by_depth: bool = True

    @property
    def weighs_conflicts(self) -> bool:
        """True: a key that comes again has weight 0."""
        return True

    def __post_init__(self) -> None:
        require_positive("ConflictHistory", self, "weight")

    def solve(self, problem: LayerProblem) -> Update:
        """Solve with the weighted history."""
        if (earlier := problem.history.keys) is None:
            return self.inner.solve(problem)
        times = self.weight * (problem.index + 1 if self.by_depth else 1)
        weights = times * harmony(earlier, problem.keys)
        return self.inner.solve(replace(problem, history=problem.history.weighted(weights)))


def harmony(earlier: Float[Tensor, "m d_in"], keys: Float[Tensor, "n d_in"]) -> Float[Tensor, " m"]:
    """Return Lambda: for each earlier key, 1 less its largest absolute cosine with a new one, in [0, 1].

    Rounding takes the official one to -1e-16; this one is clamped, because it is a weight.

    Example:
        >>> import torch
        >>> harmony(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[-3.0, 0.0]])).tolist()
        [0.0, 1.0]
    """
    old, new = (
        each / each.norm(dim=1, keepdim=True).clamp_min(torch.finfo(each.dtype).tiny) for each in (earlier, keys)
    )
    nearest: Tensor = (old @ new.T).abs().amax(1)
    return (1 - nearest).clamp(0, 1)
