"""Exact allocation: the smallest changes whose effects at the value site add up to the residual."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.allocators.base import Allocator, LayerContext
from cakeflow.errors import ConfigError, NumericalError


@dataclass(frozen=True)
class Jacobian(Allocator):
    """``delta_l = w_l M_l^T (sum_{j >= l} w_j M_j M_j^T)^-1 R`` (CAKE, theorem 1), for each fact with its own M.

    The smallest changes, weighted by 1 / w_j, whose effects at the value site add up to the residual; with the identity
    for every M_j this is ``Sequential``. Conjugate gradients solve the system without forming it: with M close to the
    identity a few steps suffice. M and the residual are measured again before each layer.

    Attributes:
        tolerance: Relative residual at which a fact's system counts as solved.
        iterations: Largest number of steps.
    """

    tolerance: float = 1e-4
    iterations: int = 100
    residual_at = "last"

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1 or not self.iterations > 0:
            values = f"{self.tolerance} and {self.iterations}"
            raise ConfigError(f"Jacobian: tolerance must lie in (0, 1) and iterations be above 0, got {values}")

    def allocate(self, residual: Float[Tensor, "n d_out"], context: LayerContext) -> Float[Tensor, "n d_out"]:
        """Solve the system of the layers from this one on and return this layer's part."""
        weights = (context.weights / context.weights.amax(-1, keepdim=True))[..., context.index :]
        if weights.shape[-1] == 1:
            return residual
        linear_map = context.linear_map
        if linear_map is None:
            raise ConfigError("Jacobian needs the linear map of the layer's context, which has none")

        def effect(covector: Tensor) -> Tensor:
            parts = linear_map.vjp(covector)
            return linear_map.jvp([weights[..., j, None] * part for j, part in enumerate(parts)])

        solution = conjugate_gradients(effect, residual, self.tolerance, self.iterations)
        return weights[..., 0, None] * linear_map.vjp(solution)[0]


def conjugate_gradients(
    apply: Callable[[Float[Tensor, "n d"]], Float[Tensor, "n d"]],
    right: Float[Tensor, "n d"],
    tolerance: float,
    iterations: int,
) -> Float[Tensor, "n d"]:
    """Solve n systems ``A_i x_i = b_i`` side by side, each A_i symmetric and positive definite.

    Args:
        apply: Product of row i with A_i.
        right: b, one row per system.
        tolerance: Relative residual at which a system counts as solved; its solution then stays fixed.
        iterations: Largest number of steps.

    Raises:
        NumericalError: If a system is not solved by then, or is not positive definite.

    Example:
        >>> import torch
        >>> scale = torch.tensor([[1.0, 2.0], [4.0, 8.0]], dtype=torch.float64)
        >>> conjugate_gradients(lambda x: scale * x, scale, 1e-12, 10).tolist()
        [[1.0, 1.0], [1.0, 1.0]]
    """
    solution, rest = torch.zeros_like(right), right.clone()
    direction, energy = rest.clone(), rest.square().sum(-1)
    goal = tolerance**2 * energy
    for _ in range(iterations):
        active = energy > goal
        if not bool(active.any()):
            return solution
        product = apply(direction)
        curvature = (direction * product).sum(-1)
        if bool((active & ~(curvature > 0)).any()):
            raise NumericalError("the exact allocation's system is not positive definite; load the model in float32")
        step = torch.where(active, energy / curvature, 0.0)[:, None]
        solution = solution + step * direction
        rest = rest - step * product
        updated = torch.where(active, rest.square().sum(-1), energy)
        direction = torch.where(active[:, None], rest + (updated / energy)[:, None] * direction, direction)
        energy = updated
    if bool((energy > goal).any()):
        worst = float((energy / goal).max().sqrt()) * tolerance
        raise NumericalError(
            f"the exact allocation left a relative residual of {worst:.1e} after {iterations} steps; allow more "
            "iterations or a larger tolerance"
        )
    return solution
