"""A guard of the directions in which a weight is strongest: what a model can do in general lies there."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow import LayerProblem, LeastSquares, Solver, Update
from cakeflow.errors import ConfigError, require_choice

Sides = Literal["both", "input"]
Origin = Literal["original", "present"]
Directions = tuple[Float[Tensor, "d_out k"], Float[Tensor, "d_in k"]]
"""Orthonormal columns: directions of the output, and of the input."""


@dataclass(frozen=True)
class SpectralGuard(Solver):
    """``(I - a U U^T) D (I - a V V^T)``: the inner change without its part along the strongest directions of a weight.

    U and V are the first k singular vectors of the weight, k the fewest whose share of the energy exceeds ``share``.
    The defaults are REVIVE (arXiv 2601.11042), whose text does not say whether a component's energy is its singular
    value or the square of it. SPHERE (code in EasyEdit) has ``share`` 0.5, ``strength`` 0.5, ``sides`` input,
    ``unit_rows`` and, in its code, the ``present`` weight, where the paper has the original one. A change in factors
    stays one of the same rank.

    The directions of the original weight are computed once where earlier keys are preserved, in each batch otherwise.

    Attributes:
        inner: Any solver.
        share: Part of the energy, 0 to below 1; 0 leaves the change alone.
        strength: a, the part of the change along these directions that is taken away, 0 to 1.
        power: Power of a singular value that is its energy: 1 or 2.
        sides: Whether outputs and inputs are guarded, or the inputs only.
        unit_rows: Whether the rows of the weight are scaled to norm 1 before.
        weight: The weight before any edit, or the one before this change.
    """

    matrices = 3
    inner: Solver = field(default_factory=LeastSquares)
    share: float = 0.1
    strength: float = 1.0
    power: int = 2
    sides: Sides = "both"
    unit_rows: bool = False
    weight: Origin = "original"

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ConfigError(f"SpectralGuard: share must lie in [0, 1), got {self.share}")
        if not 0 <= self.strength <= 1:
            raise ConfigError(f"SpectralGuard: strength must lie in [0, 1], got {self.strength}")
        if self.power not in (1, 2):
            raise ConfigError(f"SpectralGuard: power must be 1 or 2, got {self.power}")
        require_choice("SpectralGuard.sides", self.sides, Sides)
        require_choice("SpectralGuard.weight", self.weight, Origin)

    def solve(self, problem: LayerProblem) -> Update:
        """Solve by ``inner`` and take away what lies along the strongest directions, of a deferred change as well."""
        update = self.inner.solve(problem)
        if self.share == 0 or self.strength == 0:
            return update
        if update.gradients is not None:
            raise ConfigError(
                f"SpectralGuard: {type(self.inner).__name__} reads the keys of earlier batches from their changes, "
                "which a guard alters; leave the guard out, or guard a solver with target values"
            )
        directions = self._directions(problem)
        deferred = None if update.deferred is None else self._guarded(update.deferred, directions)
        return replace(self._guarded(update, directions), deferred=deferred)

    def _directions(self, problem: LayerProblem) -> Directions:
        find = partial(strongest, share=self.share, power=self.power, unit_rows=self.unit_rows)
        if self.weight == "present":
            return find(problem.weight)
        name = ("strongest", self.share, self.power, self.unit_rows)
        return problem.history.cached(name, lambda: find(problem.original_weight))

    def _guarded(self, update: Update, directions: Directions) -> Update:
        outputs, inputs = directions
        right = _without(update.right, inputs, self.strength)
        if self.sides == "input":
            return replace(update, right=right)
        if update.left is None:
            return replace(update, right=_without(right.T, outputs, self.strength).T)
        return replace(update, right=right, left=_without(update.left, outputs, self.strength), is_plain=False)


def strongest(
    weight: Float[Tensor, "d_out d_in"], share: float, power: int = 2, *, unit_rows: bool = False
) -> Directions:
    """Return the first left and right singular vectors of a weight, in float64.

    As many as are needed for their singular values, to a power, to exceed a share of the sum over all; none of a weight
    that is 0.

    Args:
        weight: The weight.
        share: Part of the sum, below 1.
        power: Power of the singular values.
        unit_rows: Whether its rows are scaled to norm 1 before.

    Example:
        >>> import torch
        >>> strongest(torch.diag(torch.tensor([1.0, 3.0])), 0.5)[0].abs().tolist()
        [[0.0], [1.0]]
    """
    matrix = weight.double()
    if unit_rows:
        matrix = matrix / torch.linalg.vector_norm(matrix, dim=1, keepdim=True).clamp_min(
            torch.finfo(matrix.dtype).tiny
        )
    if matrix.shape[0] > matrix.shape[1]:  # the eigenbasis of the smaller Gram matrix, hence the smaller solve
        inputs, outputs = _leading(matrix.T, share, power)
    else:
        outputs, inputs = _leading(matrix, share, power)
    return outputs, inputs


def _leading(matrix: Float[Tensor, "d e"], share: float, power: int) -> Directions:
    """Return the leading left singular vectors of a wide matrix, and a basis of the span of the right ones."""
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    energy = values.flip(0).clamp_min(0).pow(power / 2)
    part = energy.cumsum(0) / energy.sum()
    count = min(int((part <= share).sum()) + 1, len(part)) if float(energy.sum()) > 0 else 0
    left = vectors[:, len(vectors) - count :]
    return left, torch.linalg.qr(matrix.T @ left).Q  # orthonormal to the last bit, which a division would not be


def _without(rows: Float[Tensor, "n d"], basis: Float[Tensor, "d k"], strength: float) -> Float[Tensor, "n d"]:
    """Return rows without a part of their components in the span of a basis."""
    return torch.addmm(rows, rows @ basis, basis.T, alpha=-strength)
