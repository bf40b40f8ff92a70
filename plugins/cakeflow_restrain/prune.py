"""Damping of the whole change of a weight where its singular values exceed the original weight's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow import LayerProblem, LeastSquares, Solver, Update
from cakeflow.errors import ConfigError


@dataclass(frozen=True)
class Prune(Solver):
    """``W_0 + D'`` when the run ends, D' the whole change with damped singular values (PRUNE, Ma et al. 2025, eq. 7).

    Singular values above the largest of W_0, s_0, become ``log_base(s) - log_base(s_0) + s_0``.

    With ``every_batch`` it is a filter of each batch's change D instead, ``F(D) = (W_0 + (W + D - W_0)') - W`` for the
    present weight W: after every batch the whole change is damped, and nothing is left to do when the run ends. Around
    ``FromScratch``, which takes back the last filter's error ``F(D) - D`` (the error carry of OTE), a stream is PRUNE
    over one batch of all its facts. Around other solvers the damped part is lost, and damped again by every batch.

    Attributes:
        inner: Any solver.
        base: Base of the logarithm; the paper also tries 2, 1.5 and 1.2.
        double_add: Add D' to the edited weight, ``W_0 + D + D'``, as the code of AlphaEdit's and BLUE's repositories
            does; published PRUNE numbers from there carry it.
        every_batch: Damp behind every batch, once all its layers are written, rather than when the run ends.
    """

    matrices = 6
    inner: Solver = field(default_factory=LeastSquares)
    base: float = math.e
    double_add: bool = False
    every_batch: bool = False

    def __post_init__(self) -> None:
        if not self.base > 1:
            raise ConfigError(f"Prune: base must be above 1, got {self.base}")
        if self.every_batch and self.double_add:
            raise ConfigError("Prune: double_add=True is a slip at the end of a run; set it or every_batch to False")

    def solve(self, problem: LayerProblem) -> Update:
        """Solve by ``inner``; the damping is deferred until all layers are written, or the task of ``finish``."""
        update = self.inner.solve(problem)
        if not self.every_batch:
            return update
        original, weight = problem.original_weight.double(), problem.weight.double()
        damped = self._damped(original, weight + update.dense - original)
        return replace(update, deferred=Update(damped - (weight - original)))

    def finish(
        self, original_weight: Float[Tensor, "d_out d_in"], weight: Float[Tensor, "d_out d_in"]
    ) -> Float[Tensor, "d_out d_in"]:
        """Damp the singular values of the run's whole change, unless every batch has done so."""
        after = self.inner.finish(original_weight, weight)
        if self.every_batch:
            return after
        original, after = original_weight.double(), after.double()
        return self._damped(original, after - original) + (after if self.double_add else original)

    def _damped(
        self, original: Float[Tensor, "d_out d_in"], change: Float[Tensor, "d_out d_in"]
    ) -> Float[Tensor, "d_out d_in"]:
        """Return a change with damped singular values."""
        left, values, right = torch.linalg.svd(change, full_matrices=False)
        limit = torch.linalg.matrix_norm(original, 2)
        damped = torch.where(values > limit, (values / limit).log() / math.log(self.base) + limit, values)
        result: Tensor = (left * damped) @ right
        return result
