"""Null-space projection over another solver: changes that leave the outputs of the preserved keys alone."""

from __future__ import annotations

from dataclasses import dataclass, field

from cakeflow.errors import NumericalError, ShapeError, require_positive
from cakeflow.solvers.base import Solver
from cakeflow.solvers.least_squares import LeastSquares
from cakeflow.solvers.problem import LayerProblem, Update


@dataclass(frozen=True)
class NullSpace(Solver):
    """``inner`` on keys projected to the null space of the preserved keys (AlphaEdit, Fang et al. 2025, eq. 14).

    With ``LeastSquares(ridge)`` inside this is D = R K^T P (K K^T P + K_p K_p^T P + ridge I)^-1 of the paper: for
    K' = K P the symmetric system K'^T K' + S'^T S' + ridge I has the same solution. Both the paper and CAKE print
    ridge = 1 (eq. 63), the official code has 10.

    Attributes:
        inner: The solver; its problem has projected keys and no covariance.
        threshold: Eigenvalues of C below it count as null; None takes the covariance's own, which is the model's.
    """

    inner: Solver = field(default_factory=lambda: LeastSquares(ridge=10.0))
    threshold: float | None = None

    def __post_init__(self) -> None:
        require_positive("NullSpace", self, "threshold")

    def solve(self, problem: LayerProblem) -> Update:
        """Solve the projected problem by ``inner``."""
        covariance = problem.covariance
        if covariance is None:
            raise ShapeError("NullSpace needs the covariance of the keys to preserve; the problem has none")
        threshold = covariance.threshold if self.threshold is None else self.threshold
        if covariance.rank(threshold) == 0:
            raise NumericalError(
                f"no eigenvalue of the keys' second moment is below threshold {threshold} (smallest "
                f"{float(covariance.eigen[0][0]):.1e}): nothing could change; raise the threshold"
            )
        return self.inner.solve(problem.in_null_space(threshold))
