"""What the walk demands of whoever fills a slot, checked as it goes; an error names the class at fault."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.allocators import Allocator, ShareAllocator, Turn
from cakeflow.errors import NumericalError, ShapeError
from cakeflow.problem import LayerProblem, Update
from cakeflow.solvers import Solver
from cakeflow.weighters import Weighter


def checked_weights(weighter: Weighter, weights: Tensor, facts: int, layers: Sequence[int]) -> Float[Tensor, "*n l"]:
    """A weighter's answer, in float64.

    Raises:
        ShapeError: If it is neither (l) nor (n, l), not finite, negative or all 0.
    """
    if tuple(weights.shape) not in ((len(layers),), (facts, len(layers))):
        raise ShapeError(
            f"{_name(weighter)}: expected weights (l = {len(layers)}) or (n = {facts}, l = {len(layers)}), "
            f"got {tuple(weights.shape)}"
        )
    if not bool(torch.isfinite(weights).all() and (weights >= 0).all() and (weights.amax(-1) > 0).all()):
        raise ShapeError(
            f"{_name(weighter)}: weights must be finite, not negative and not all 0, got {weights.tolist()}"
        )
    return weights.double()


def checked_residual(
    allocator: Allocator, residual: Tensor, missing: Float[Tensor, "n d_out"], turn: Turn
) -> Float[Tensor, "n d_out"]:
    """An allocator's answer.

    Raises:
        ShapeError: If it has another shape than what is missing, or its shares break ``ShareAllocator``'s contract.
        NumericalError: If it is not finite.
    """
    if residual.shape != missing.shape:
        raise ShapeError(f"{_name(allocator)}: expected {tuple(missing.shape)}, got {tuple(residual.shape)}")
    if not bool(torch.isfinite(residual).all()):
        raise NumericalError(f"{_name(allocator)}: what it gives layer {turn.site.layer} is not finite")
    if isinstance(allocator, ShareAllocator):
        _check_shares(allocator, turn)
    return residual


def _check_shares(allocator: ShareAllocator, turn: Turn) -> None:
    shares = allocator.shares(turn.weights)
    if shares.shape != turn.weights.shape:
        raise ShapeError(f"{_name(allocator)}: {tuple(turn.weights.shape)} weights gave {tuple(shares.shape)} shares")
    taken = turn.weights > 0  # where a fact gives a layer no weight, it takes nothing there
    if not bool((((shares > 0) | ~taken) & (shares >= 0) & (shares <= 1 + 1e-12)).all()):
        raise ShapeError(f"{_name(allocator)}: shares must lie in (0, 1], got {shares.tolist()}")
    if allocator.anchor == "last" and bool((((shares[..., -1] - 1).abs() > 1e-12) & taken[..., -1]).any()):
        raise ShapeError(
            f"{_name(allocator)}: the last layer must take all that is left (a share of 1), got "
            f"{shares[..., -1].tolist()}"
        )


def checked_update(solver: Solver, update: Update, problem: LayerProblem, layer: int) -> Update:
    """A solver's answer.

    Raises:
        ShapeError: If it does not fit the weight.
        NumericalError: If it is not finite.
    """
    for part in (update, update.kept):
        if part is None:
            continue
        (n, d_in), (_, d_out) = problem.keys.shape, problem.residual.shape
        wanted = ((d_out, d_in),) if part.left is None else ((n, d_in), (n, d_out))
        found = tuple(tuple(each.shape) for each in (part.right, part.left) if each is not None)
        if found != wanted:
            raise ShapeError(f"{_name(solver)}: layer {layer} needs an update of shape {wanted}, got {found}")
        if not all(bool(torch.isfinite(each).all()) for each in (part.right, part.left) if each is not None):
            raise NumericalError(
                f"{_name(solver)}: layer {layer}: the update has values that are not finite; set ridge higher"
            )
    return update


def _name(part: object) -> str:
    return f"{type(part).__module__}.{type(part).__qualname__}"
