"""The exact allocation: what each layer adds is chosen for what reaches the value site."""

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

    The smallest changes, weighted by 1 / w_j, whose effects at the value site add up to the residual; ``Sequential`` is the
    same with every M_j taken as the identity. Conjugate gradients solve the system without forming it: with M close to
    the identity a few steps serve. Before each layer both M and the residual are measured anew.

    Attributes:
        tolerance: Relative residual at which a fact's solution is taken.
        iterations: Most steps.
    """

    tolerance: float = 1e-4
    iterations: int = 100
    residual_at = "last"

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1 or not self.iterations > 0:
            given = f"{self.tolerance} and {self.iterations}"
            raise ConfigError(f"Jacobian: tolerance must lie in (0, 1) and iterations be above 0, got {given}")

    def allocate(self, residual: Float[Tensor, "n d_out"], context: LayerContext) -> Float[Tensor, "n d_out"]:
        """See ``Allocator.allocate``."""
        weights = (context.weights / context.weights.amax(-1, keepdim=True))[..., context.index :]
        if weights.shape[-1] == 1:
            return residual
        chain = context.linear_map
        if chain is None:
            raise ConfigError("Jacobian needs the turn's chain")

        def effect(covector: Tensor) -> Tensor:
            pulled = chain.vjp(covector)
            return chain.jvp([weights[..., j, None] * each for j, each in enumerate(pulled)])

        solution = conjugate_gradients(effect, residual, self.tolerance, self.iterations)
        return weights[..., 0, None] * chain.vjp(solution)[0]


def conjugate_gradients(
    apply: Callable[[Float[Tensor, "n d"]], Float[Tensor, "n d"]],
    right: Float[Tensor, "n d"],
    tolerance: float,
    iterations: int,
) -> Float[Tensor, "n d"]:
    """Solve n systems ``A_i x_i = b_i`` side by side, each A_i symmetric and positive definite.

    Args:
        apply: Multiplies row i by A_i.
        right: b, one row per system.
        tolerance: Relative residual at which a system is solved; it is then left alone.
        iterations: Most steps.

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
    wanted = tolerance**2 * energy
    for _ in range(iterations):
        active = energy > wanted
        if not bool(active.any()):
            return solution
        product = apply(direction)
        curvature = (direction * product).sum(-1)
        if bool((active & ~(curvature > 0)).any()):
            raise NumericalError("the exact allocation's system is not positive definite; load the model in float32")
        step = torch.where(active, energy / curvature, 0.0)[:, None]
        solution = solution + step * direction
        rest = rest - step * product
        now = torch.where(active, rest.square().sum(-1), energy)
        direction = torch.where(active[:, None], rest + (now / energy)[:, None] * direction, direction)
        energy = now
    if bool((energy > wanted).any()):
        left = float((energy / wanted).max().sqrt()) * tolerance
        raise NumericalError(
            f"the exact allocation left a relative residual of {left:.1e} after {iterations} steps; allow more "
            "iterations or a larger tolerance"
        )
    return solution
