"""The solver slot."""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor

from cakeflow.solvers.problem import LayerProblem, Update


class Solver(ABC):
    """A map from keys and residuals to a weight change.

    Contract: pure (the same problem gives the same update; only cached results of the problem's history change),
    float64 in and out, no reference to a model. Subclasses are frozen dataclasses that override ``solve`` only; to
    change another solver, wrap it in one whose field is called ``inner``.

    The keys of earlier edits are ``problem.history``, a ``KeyHistory``: its rows (``keys``, with ``facts`` and
    ``batches``), their sum of outer products (``outer``), and, cached from batch to batch, the rows under a linear map
    (``derive``), a Gram factor (``factor``) and whatever else grows with them (``grown``).

    Attributes:
        matrices: Number of float64 matrices of the weight's size that ``solve`` or ``finish`` needs at once, those of
            the inner solver aside; part of the memory estimate.
    """

    matrices = 0  # no annotation: jsonargparse stumbles over ClassVar here

    @property
    def _inner(self) -> Solver | None:
        inner = getattr(self, "inner", None)
        return inner if isinstance(inner, Solver) else None

    @property
    def needs_targets(self) -> bool:
        """True if keys and residuals are used; without them no target values are searched for."""
        return self._inner.needs_targets if self._inner else True

    @property
    def weighs_conflicts(self) -> bool:
        """True if the solver weighs earlier keys that new facts have too; without that, they are left out."""
        return self._inner.weighs_conflicts if self._inner else False

    def total_matrices(self) -> int:
        """Return the sum of ``matrices`` over this solver and those inside it."""
        return self.matrices + (self._inner.total_matrices() if self._inner else 0)

    @abstractmethod
    def solve(self, problem: LayerProblem) -> Update:
        """Solve one layer.

        Args:
            problem: Keys n x d_in, residuals n x d_out, and the keys to preserve.

        Returns:
            The change of the weight, d_out x d_in, as factors where it has low rank.

        Raises:
            NumericalError: If the system cannot be solved.
        """

    def finish(
        self, original_weight: Float[Tensor, "d_out d_in"], weight: Float[Tensor, "d_out d_in"]
    ) -> Float[Tensor, "d_out d_in"]:
        """Return a layer's weight for the end of a run of edits; by default that of an inner solver, or unchanged.

        Args:
            original_weight: The weight before any edit.
            weight: The present weight, in float32 or float64; the same object is returned where nothing changes.
        """
        return self._inner.finish(original_weight, weight) if self._inner else weight
