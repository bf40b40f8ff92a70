"""A penalty on directions that mattered to earlier facts (HSE)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.targets import ObjectiveTerm, PreparedTerm, SearchProblem, TermRows


@dataclass(frozen=True)
class FisherPenalty(ObjectiveTerm):
    """Half of ``sum_d F_d delta_d^2``, F the importance of each direction to earlier facts, scaled to 0 .. 1.

    F is ``SearchProblem.importance``: for each earlier fact the mean squared gradient of its whole objective along its
    search. HSE's code scales it by its minimum and maximum, so that the penalty stays below ``factor |delta|^2 / 2``
    however many facts there are (the paper's eq. 16 has the Fisher matrix at the optimum, not scaled). Before the first
    fact, and for an F without any difference, the term is 0.

    Attributes:
        factor: Weight of the term (phi, ``fisher_factor``).
    """

    needs_importance = True
    factor: float = 0.1

    def prepare(self, problem: SearchProblem) -> PreparedTerm:
        """Scale the importance."""
        return _PreparedPenalty(self.factor, None if problem.importance is None else scaled(problem.importance))


def scaled(importance: Float[Tensor, " d_out"]) -> Float[Tensor, " d_out"]:
    """Return the importance scaled to 0 .. 1; 0 where it is the same in all directions."""
    low, high = importance.aminmax()
    return (importance - low) / (high - low) if high > low else torch.zeros_like(importance)


@dataclass(frozen=True, eq=False)
class _PreparedPenalty(PreparedTerm):
    weight: float
    importance: Float[Tensor, " d_out"] | None

    def rows(self, delta: Tensor) -> Iterator[TermRows]:
        if self.importance is not None:
            value = 0.5 * (self.importance.to(delta) * delta[:, 0].square()).sum(1)
            yield TermRows(torch.arange(len(delta), device=delta.device), value)

    def factor(self, solved: Tensor) -> float:
        return self.weight
