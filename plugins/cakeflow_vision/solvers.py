"""Least squares with a ridge in proportion to the second moment, for representations of few images."""

from __future__ import annotations

from dataclasses import dataclass

from cakeflow.errors import ConfigError, ShapeError
from cakeflow.solvers import LayerProblem, LeastSquares, Solver, Update


@dataclass(frozen=True)
class RelativeRidge(Solver):
    """``LeastSquares`` with the ridge ``share * lambda * mean(diag C)``.

    Fewer images than the representation is wide leave C singular, and its scale differs from model to model.

    Attributes:
        share: The ridge, in parts of the mean second moment.

    Raises:
        ConfigError: If it is not above 0.
    """

    matrices = 2
    share: float = 0.01

    def __post_init__(self) -> None:
        if not self.share > 0:
            raise ConfigError(f"share must be above 0, got {self.share}: with few images the system is singular")

    def solve(self, problem: LayerProblem) -> Update:
        """Solve with the ridge of this problem's second moment."""
        if problem.covariance is None:
            raise ShapeError("RelativeRidge needs the covariance of the keys to preserve; the problem has none")
        ridge = self.share * problem.covariance.weight * float(problem.covariance.moment.diagonal().mean())
        return LeastSquares(ridge).solve(problem)
