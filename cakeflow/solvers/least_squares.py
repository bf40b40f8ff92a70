"""Regularised least squares: MEMIT's solve, and the inner solve of AlphaEdit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.errors import ConfigError, NumericalError, require_choice
from cakeflow.solvers.base import Solver
from cakeflow.solvers.problem import LayerProblem, Update

Form = Literal["auto", "dual", "primal"]
"""The system that is factored."""


@dataclass(frozen=True)
class LeastSquares(Solver):
    """``D = R^T K A^-1`` with ``A = lambda C + S^T S + K^T K + ridge I`` (MEMIT, Meng et al. 2023, eq. 14).

    The papers write keys as columns: D = R K^T (lambda C + K_p K_p^T + K K^T)^-1. Two forms agree: ``dual`` factors
    the Gram matrix of the keys (one row per fact, grown from batch to batch), ``primal`` factors A (d_in x d_in).

    Attributes:
        ridge: Multiple of the identity in A (``L2`` in AlphaEdit's code).
        form: ``dual``, ``primal``, or ``auto`` for the smaller system.
    """

    ridge: float = 0.0
    form: Form = "auto"

    def __post_init__(self) -> None:
        if not self.ridge >= 0:
            raise ConfigError(f"ridge must be 0 or more, got {self.ridge}")
        require_choice("form", self.form, Form)

    def solve(self, problem: LayerProblem) -> Update:
        """Solve in the form with the smaller system, or in the one of ``form``."""
        if problem.covariance is None and self.ridge == 0:
            raise ConfigError("LeastSquares without a covariance needs ridge above 0")
        n, d_in = problem.keys.shape
        dual = self.form == "dual" or (self.form == "auto" and n + len(problem.history) <= d_in)
        return Update((_dual if dual else _primal)(problem, self.ridge), problem.residual, is_plain=True)


def _dual(problem: LayerProblem, ridge: float) -> Float[Tensor, "n d_in"]:
    """Woodbury: rows of ``(I + K M K^T)^-1 K M`` with ``M = (lambda C + ridge I)^-1 = B B^T``, solved for K B."""
    if (covariance := problem.covariance) is None:
        root = math.sqrt(ridge)
        return problem.history.factor(("gram", ridge), lambda keys: keys / root).last_rows(problem.keys) / root
    factor = problem.history.factor(("gram", ridge, covariance.weight), partial(covariance.whiten, ridge=ridge))
    return covariance.unwhiten(factor.last_rows(problem.keys), ridge)


def _primal(problem: LayerProblem, ridge: float) -> Float[Tensor, "n d_in"]:
    """Rows ``K A^-1`` by the Cholesky factor of A."""
    keys = problem.keys
    system = keys.T @ keys
    system += problem.history.outer()
    if problem.covariance is not None:
        system.add_(problem.covariance.moment, alpha=problem.covariance.weight)
    system.diagonal().add_(ridge)
    # no jitter on failure: it would be a ridge that the user did not choose
    lower, info = torch.linalg.cholesky_ex(system)
    pivots = lower.diagonal().square()
    if int(info) or pivots.min() <= 1e-15 * pivots.max():
        raise NumericalError(f"the {len(system)}-wide system is not positive definite; set ridge above {ridge}")
    return torch.cholesky_solve(keys.T, lower).T
