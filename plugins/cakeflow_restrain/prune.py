"""Damping of a run's whole change where its singular values exceed the original weight's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow import LayerProblem, LeastSquares, Solver, Update
from cakeflow.errors import ConfigError


@dataclass(frozen=True)
class Prune(Solver):
    """``W_0 + D'`` when the run ends, D' the whole change with damped singular values (PRUNE, Ma et al. 2025, eq. 7).

    Singular values above the largest of W_0, s_0, become ``log_base(s) - log_base(s_0) + s_0``.

    Attributes:
        inner: Any solver.
        base: Base of the logarithm; the paper also tries 2, 1.5 and 1.2.
        double_add: Add D' to the edited weight, ``W_0 + D + D'``, as the code of AlphaEdit's and BLUE's repositories
            does; published PRUNE numbers from there carry it.
    """

    matrices = 6
    inner: Solver = field(default_factory=LeastSquares)
    base: float = math.e
    double_add: bool = False

    def __post_init__(self) -> None:
        if not self.base > 1:
            raise ConfigError(f"Prune: base must be above 1, got {self.base}")

    def solve(self, problem: LayerProblem) -> Update:
        """Solve by ``inner``; the damping is the task of ``finish``."""
        return self.inner.solve(problem)

    def finish(
        self, original_weight: Float[Tensor, "d_out d_in"], weight: Float[Tensor, "d_out d_in"]
    ) -> Float[Tensor, "d_out d_in"]:
        """Damp the singular values of the run's whole change."""
        original, weight = original_weight.double(), self.inner.finish(original_weight, weight).double()
        left, values, right = torch.linalg.svd(weight - original, full_matrices=False)
        limit = torch.linalg.matrix_norm(original, 2)
        damped = torch.where(values > limit, (values / limit).log() / math.log(self.base) + limit, values)
        change: Tensor = (left * damped) @ right
        return change + (weight if self.double_add else original)
