"""Keys apart from what all names have in common."""

from __future__ import annotations

from dataclasses import dataclass, field

from cakeflow import LayerProblem, LeastSquares, Solver, Update
from cakeflow.errors import ConfigError, NumericalError, ShapeError


@dataclass(frozen=True)
class MinorSpace(Solver):
    """``inner`` on keys without the leading eigenvectors U of C, ``k' = k - U U^T k`` (the keys of SUIT).

    U has the fewest eigenvectors whose share of the trace of C exceeds ``energy``: as ``NullSpace`` with a threshold
    that depends on C. SUIT takes C at the last tokens of 10,000 names (``statistics.at: names``),
    and 0.4 for Llama, else 0.6. Its other part, for values, is ``SwapSearch``.

    Attributes:
        inner: The solver; its problem has projected keys and no covariance.
        energy: Share of the trace, 0 to below 1; 0 leaves the problem alone.
    """

    inner: Solver = field(default_factory=lambda: LeastSquares(ridge=10.0))
    energy: float = 0.4

    def __post_init__(self) -> None:
        if not 0 <= self.energy < 1:
            raise ConfigError(f"MinorSpace: energy must lie in [0, 1), got {self.energy}")

    def solve(self, problem: LayerProblem) -> Update:
        """Solve the projected problem by ``inner``.

        Raises:
            ShapeError: If the problem has no covariance.
            NumericalError: If all eigenvectors lead.
        """
        if self.energy == 0:
            return self.inner.solve(problem)
        if problem.covariance is None:
            raise ShapeError("MinorSpace needs the covariance of the keys to preserve; the problem has none")
        values = problem.covariance.eigen[0].flip(0)
        count = int((values.cumsum(0) / values.sum() <= self.energy).sum()) + 1
        if count >= len(values):
            raise NumericalError(
                f"all {len(values)} eigenvectors of the second moment are needed for {self.energy} of its trace, so "
                "that nothing could change; lower MinorSpace.energy"
            )
        return self.inner.solve(problem.in_null_space(float(values[count - 1])))
