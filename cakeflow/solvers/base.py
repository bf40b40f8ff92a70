"""The solver slot."""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor

from cakeflow.solvers.problem import LayerProblem, Update


class Solver(ABC):
    """Turns keys and residuals into a weight change.

    Contract: pure (the same problem gives the same update; nothing but memos of the problem's history is touched),
    float64 in and out, no reference to a model. Subclasses are frozen dataclasses that override ``solve`` only; to
    change another solver, wrap it in one whose field is called ``inner``.

    Attributes:
        matrices: Float64 matrices as large as the weight that ``solve`` or ``finish`` holds at once, the inner solver's
            aside; what the foreseen memory counts.
    """

    matrices = 0  # no annotation: jsonargparse stumbles over ClassVar here

    @property
    def _inner(self) -> Solver | None:
        inner = getattr(self, "inner", None)
        return inner if isinstance(inner, Solver) else None

    @property
    def needs_targets(self) -> bool:
        """Whether keys and residuals are used: without them no target values are looked for."""
        return self._inner.needs_targets if self._inner else True

    def held(self) -> int:
        """``matrices`` of this solver and those inside it."""
        return self.matrices + (self._inner.held() if self._inner else 0)

    @abstractmethod
    def solve(self, problem: LayerProblem) -> Update:
        """Solve one layer.

        Args:
            problem: Keys n x d_in, residuals n x d_out, and what to preserve.

        Returns:
            The change of the weight, d_out x d_in, as factors where it has low rank.

        Raises:
            NumericalError: If the system cannot be solved.
        """

    def finish(
        self, original_weight: Float[Tensor, "d_out d_in"], weight: Float[Tensor, "d_out d_in"]
    ) -> Float[Tensor, "d_out d_in"]:
        """What a layer's weight becomes when a run of edits ends; by default what an inner solver says, or as it is.

        Args:
            original_weight: The weight before any edit.
            weight: The weight now, in float32 or float64; returned itself where nothing is to change.
        """
        return self._inner.finish(original_weight, weight) if self._inner else weight
