"""A history that weighs as much as all the keys that a run is planned to have, however few there are so far."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace

import torch

from cakeflow.errors import RequestWarning, require_count
from cakeflow.solvers.base import Solver
from cakeflow.solvers.least_squares import LeastSquares
from cakeflow.solvers.problem import LayerProblem, Update


@dataclass(frozen=True)
class PlannedHistory(Solver):
    """``inner`` with the earlier keys weighted so that they count as ``planned`` keys (HSE's replay).

    With LeastSquares inside this is ``D = R K^T (lambda C + alpha S + K K^T)^-1`` (columns as keys) of HSE's code with
    ``alpha = planned / m`` for m earlier keys. The code has alpha = B / b after b of B batches: the same where batches
    are equal. It is never below 1: past the plan the history counts as it is, and a warning says so once. Keys are
    counted, not facts: a fact that is written at two tokens, or in a chat as well, has two.

    Attributes:
        inner: The solver.
        planned: Number of keys that the run is planned to have.
    """

    inner: Solver = field(default_factory=LeastSquares)
    planned: int = field(kw_only=True)

    def __post_init__(self) -> None:
        require_count("PlannedHistory.planned", self.planned, 1)

    def factor(self, earlier: int) -> float:
        """Return alpha, the weight of each of ``earlier`` keys."""
        return max(1.0, self.planned / earlier) if earlier else 1.0

    def solve(self, problem: LayerProblem) -> Update:
        """Solve the problem with the weighted history by ``inner``."""
        history, keys = problem.history, len(problem.keys)
        if problem.index == 0 and len(history) <= self.planned < len(history) + keys:
            warnings.warn(
                f"more than the {self.planned} planned keys: from here on each earlier key counts once, and HSE's "
                "weights no longer hold; set planned to the number of keys of the whole run",
                RequestWarning,
                stacklevel=2,
            )
        alpha = self.factor(len(history))
        if alpha == 1.0:  # nothing to scale, and the cached factor serves
            return self.inner.solve(problem)
        weights = torch.full((len(history),), alpha, dtype=torch.float64)
        return self.inner.solve(replace(problem, history=history.weighted(weights)))
