"""Equality constraints over another solver: every key gets its whole residual."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from cakeflow.errors import ConfigError, NumericalError, require_choice
from cakeflow.solvers.base import Solver
from cakeflow.solvers.least_squares import LeastSquares
from cakeflow.solvers.problem import LayerProblem, Update

Place = Literal["mean", "prompt"]
"""Keys that get their residual."""


@dataclass(frozen=True)
class EqualityConstrained(Solver):
    """``D = R^T (K A^-1 K^T)^-1 K A^-1``: each key gets its whole residual, all else changes least (EMMET; ROME eq. 2).

    A is the inner solver's metric of changes, without the new keys: ``lambda C`` and the history for
    ``LeastSquares``, so that lambda cancels. Its rows L give the constrained ones as ``(L K^T)^-1 L``. With one fact
    this is ROME. Facts whose keys coincide cannot have different residuals: their system is singular.

    Attributes:
        inner: A solver that returns factors.
        at: Keys that get their residual: the ``mean`` ones, of which the rows are made, or those of the bare
            ``prompt`` (the mixture of ROME's code of 2022; it may blow up where the two differ).
    """

    inner: Solver = field(default_factory=LeastSquares)
    at: Place = "mean"

    def __post_init__(self) -> None:
        require_choice("at", self.at, Place)

    def solve(self, problem: LayerProblem) -> Update:
        """Scale the rows of the inner solution so that ``rows K^T = I``."""
        update = self.inner.solve(problem)
        if not update.is_plain or update.deferred is not None:
            raise ConfigError(f"{self.inner!r} gives no plain factors; put EqualityConstrained inside it instead")
        keys = problem.keys if self.at == "mean" else problem.prompt_keys
        if keys is None:
            raise ConfigError("at='prompt' needs the keys of the bare prompts; the problem has none")
        reached = update.right @ keys.T
        # checked by the solution itself: a nearly singular system passes the factorisation without an error
        rows, info = torch.linalg.solve_ex(reached, update.right)
        if int(info) or not float((rows @ keys.T - torch.eye(len(keys)).to(rows)).abs().max()) < 1e-6:
            raise NumericalError(
                f"the keys of {len(keys)} facts are not independent, so that they cannot all get their residuals; edit "
                "fewer facts at once, or use the inner solver alone"
            )
        return replace(update, right=rows)
