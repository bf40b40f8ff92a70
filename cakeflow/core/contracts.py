"""What the walk demands of whoever fills a slot, checked as it goes; an error names the class at fault."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.allocators import Allocator, LayerContext, ShareAllocator
from cakeflow.errors import NumericalError, ShapeError
from cakeflow.forward.tokens import TextBatch
from cakeflow.solvers import Solver
from cakeflow.solvers.problem import LayerProblem, Update
from cakeflow.weighters import Weighter


def checked_facts(
    what: str, values: Float[Tensor, "n width"], batch: TextBatch, layer: int
) -> Float[Tensor, "n width"]:
    """Numbers of a batch, one row per fact.

    Args:
        what: Their name in an error message.
        values: One row per fact.
        batch: The n facts.
        layer: Where they were read or computed.

    Raises:
        NumericalError: If they are not finite, naming the facts.
    """
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        bad = (~finite).any(1).nonzero()[:, 0].tolist()
        found = float(values[~finite][0])
        raise NumericalError(
            f"layer {layer}, {batch.name(bad)}: {what} not finite ({found}); load the model in float32, or leave such "
            "requests out"
        )
    return values


@contextmanager
def naming(layer: int, batch: TextBatch) -> Iterator[None]:
    """Numerical errors of the body get layer and requests in front, which solvers do not know."""
    try:
        yield
    except (NumericalError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        message = str(error).removeprefix(f"layer {layer}: ")
        raise NumericalError(f"layer {layer}, {batch.name(range(len(batch)))}: {message}") from error


def solved(solver: Solver, problem: LayerProblem, layer: int, batch: TextBatch, limit: float) -> Update:
    """What a solver makes of one layer, checked.

    Args:
        solver: The solver.
        problem: What it is asked.
        layer: Index of the block.
        batch: The n facts.
        limit: Largest Frobenius norm of the change, in norms of the weight.

    Raises:
        ShapeError: See ``checked_update``.
        NumericalError: If it fails, or its change is not finite or has run away; layer and requests are named.
    """
    with naming(layer, batch):
        update = checked_update(solver, solver.solve(problem), problem, layer)
        _check_size(update, problem.weight, batch, limit)
    return update


def _check_size(update: Update, weight: Float[Tensor, "d_out d_in"], batch: TextBatch, limit: float) -> None:
    whole = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
    for part in (update, update.deferred):
        norm = 0.0 if part is None else part.norm()
        if part is not None and norm > limit * whole:
            raise NumericalError(
                f"the update's norm {norm:.3g} is {norm / whole:.3g} times the weight's, {whole:.3g}, and "
                f"max_relative_update is {limit:g}{_largest(part, batch)}; edit fewer facts at once, set ridge or "
                "statistics.cov_weight higher, targets.clamp lower, or raise max_relative_update"
            )


def _largest(update: Update, batch: TextBatch) -> str:
    if update.left is None or len(update.left) != len(batch):
        return ""
    parts = update.left.norm(dim=1) * update.right.norm(dim=1)
    worst = int(parts.argmax())
    return f" (most of it by {batch.name([worst])}, a part of norm {float(parts[worst]):.3g})"


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
    allocator: Allocator, residual: Tensor, missing: Float[Tensor, "n d_out"], context: LayerContext
) -> Float[Tensor, "n d_out"]:
    """An allocator's answer.

    Raises:
        ShapeError: If it has another shape than what is missing, or its shares break ``ShareAllocator``'s contract.
        NumericalError: If it is not finite.
    """
    if residual.shape != missing.shape:
        raise ShapeError(f"{_name(allocator)}: expected {tuple(missing.shape)}, got {tuple(residual.shape)}")
    if not bool(torch.isfinite(residual).all()):
        bad = (~torch.isfinite(residual)).any(1).nonzero()[:, 0].tolist()
        raise NumericalError(
            f"{_name(allocator)}: what it gives layer {context.site.layer} is not finite for facts {bad[:3]} of the batch"
        )
    if isinstance(allocator, ShareAllocator):
        _check_shares(allocator, context)
    return residual


def _check_shares(allocator: ShareAllocator, context: LayerContext) -> None:
    shares = allocator.shares(context.weights)
    if shares.shape != context.weights.shape:
        raise ShapeError(
            f"{_name(allocator)}: {tuple(context.weights.shape)} weights gave {tuple(shares.shape)} shares"
        )
    taken = context.weights > 0  # where a fact gives a layer no weight, it takes nothing there
    if not bool((((shares > 0) | ~taken) & (shares >= 0) & (shares <= 1 + 1e-12)).all()):
        raise ShapeError(f"{_name(allocator)}: shares must lie in (0, 1], got {shares.tolist()}")
    if allocator.residual_at == "last" and bool((((shares[..., -1] - 1).abs() > 1e-12) & taken[..., -1]).any()):
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
    for part in (update, update.deferred):
        if part is None:
            continue
        (n, d_in), (_, d_out) = problem.keys.shape, problem.residual.shape
        wanted = ((d_out, d_in),) if part.left is None else ((n, d_in), (n, d_out))
        found = tuple(tuple(each.shape) for each in (part.right, part.left) if each is not None)
        if found != wanted:
            raise ShapeError(f"{_name(solver)}: layer {layer} needs an update of shape {wanted}, got {found}")
        if not all(bool(torch.isfinite(each).all()) for each in (part.right, part.left) if each is not None):
            raise NumericalError(
                f"layer {layer}: {_name(solver)}: the update has values that are not finite; set ridge higher"
            )
    return update


def _name(part: object) -> str:
    return f"{type(part).__module__}.{type(part).__qualname__}"
