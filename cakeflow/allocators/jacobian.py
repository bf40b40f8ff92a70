"""Exact allocation: the smallest changes whose effects at the value site add up to the residual."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cakeflow.allocators.base import Allocator, LayerContext
from cakeflow.errors import AllocationWarning, ConfigError


@dataclass(frozen=True)
class Jacobian(Allocator):
    """``delta_l = w_l M_l^T (sum_{j >= l} w_j M_j M_j^T)^-1 R`` (CAKE, theorem 1), for each fact with its own M.

    The smallest changes, weighted by 1 / w_j, whose effects at the value site add up to the residual; with the identity
    for every M_j this is ``Sequential``. Conjugate gradients solve the system without forming it: with M close to the
    identity a few steps suffice; the more a model was edited, the more it takes (logged as ``layer{l}/steps``). M and
    the residual are measured again before each layer, so what one layer leaves is taken by those after it: a fact whose
    system is not solved takes the best iterate, and an ``AllocationWarning`` names it.

    Attributes:
        tolerance: Relative residual at which a fact's system counts as solved.
        iterations: Most steps for one fact; all facts of a batch make theirs side by side.
    """

    tolerance: float = 1e-4
    iterations: int = 500
    residual_at = "last"

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1 or not self.iterations > 0:
            values = f"{self.tolerance} and {self.iterations}"
            raise ConfigError(f"Jacobian: tolerance must lie in (0, 1) and iterations be above 0, got {values}")

    def allocate(self, residual: Float[Tensor, "n d_out"], context: LayerContext) -> Float[Tensor, "n d_out"]:
        """Solve the system of the layers from this one on and return this layer's part."""
        weights = (context.weights / context.weights.amax(-1, keepdim=True))[..., context.index :]
        residual = residual * (weights > 0).any(-1, keepdim=True)  # facts with no weight from here on take nothing
        if weights.shape[-1] == 1:
            return residual
        linear_map = context.linear_map
        if linear_map is None:
            raise ConfigError("Jacobian needs the linear map of the layer's context, which has none")

        def effect(covector: Tensor) -> Tensor:
            parts = linear_map.vjp(covector)
            return linear_map.jvp([weights[..., j, None] * part for j, part in enumerate(parts)])

        solution = conjugate_gradients(effect, residual, self.tolerance, self.iterations)
        context.numbers["steps"] = float(solution.steps.max())
        if unsolved := (solution.residual > self.tolerance).nonzero()[:, 0].tolist():
            warnings.warn(
                f"layer {context.site.layer}, {context.name(unsolved)}: the exact allocation left a relative residual "
                f"of up to {float(solution.residual.max()):.1e} after {int(solution.steps.max())} steps, and the best "
                "iterates are used; allow more iterations or a larger tolerance, or load the model in float32",
                AllocationWarning,
                stacklevel=2,
            )
        return weights[..., 0, None] * linear_map.vjp(solution.value)[0]


@dataclass(frozen=True, eq=False)
class Solution:
    """Solutions of n linear systems.

    Attributes:
        value: n x d, for each system the iterate with the smallest residual.
        residual: n, the norm of that residual, relative to the right side's.
        steps: n, number of steps.
    """

    value: Float[Tensor, "n d"]
    residual: Float[Tensor, " n"]
    steps: Int[Tensor, " n"]


def conjugate_gradients(
    apply: Callable[[Float[Tensor, "n d"]], Float[Tensor, "n d"]],
    right: Float[Tensor, "n d"],
    tolerance: float,
    iterations: int,
) -> Solution:
    """Solve n systems ``A_i x_i = b_i`` side by side, each A_i symmetric and positive definite.

    A system stops when it is solved, or when rounding has made it indefinite; the others go on.

    Args:
        apply: Product of row i with A_i.
        right: b, one row per system.
        tolerance: Relative residual at which a system counts as solved; its solution then stays fixed.
        iterations: Most steps of one system.

    Example:
        >>> import torch
        >>> scale = torch.tensor([[1.0, 2.0], [4.0, 8.0]], dtype=torch.float64)
        >>> conjugate_gradients(lambda x: scale * x, scale, 1e-12, 10).value.tolist()
        [[1.0, 1.0], [1.0, 1.0]]
    """
    solution, rest, direction = torch.zeros_like(right), right, right
    size = energy = right.square().sum(-1)
    best, least, steps = solution, energy, torch.zeros_like(energy, dtype=torch.long)
    active = energy > 0
    for _ in range(iterations):
        active = active & (energy > tolerance**2 * size)
        if not bool(active.any()):
            break
        product = apply(direction)
        curvature = (direction * product).sum(-1)
        active = active & (curvature > 0) & torch.isfinite(curvature)
        step = torch.where(active, energy / curvature, 0.0)[:, None]
        solution = solution + step * direction
        rest = torch.where(active[:, None], rest - step * product, rest)
        updated = torch.where(active, rest.square().sum(-1), energy)
        direction = torch.where(active[:, None], rest + (updated / energy)[:, None] * direction, direction)
        energy, steps = updated, steps + active
        better = energy < least
        best, least = torch.where(better[:, None], solution, best), torch.where(better, energy, least)
    return Solution(best, torch.where(size > 0, (least / size).sqrt(), 0.0), steps)
