"""Checks of what the parts of a method return during an edit; an error names the class at fault."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.allocators.base import Allocator, LayerContext, ShareAllocator
from cakeflow.errors import (
    ArrivalWarning,
    BlockedWarning,
    ConfigError,
    NotTakenWarning,
    NumericalError,
    ShapeError,
    SharedKeyWarning,
    listed,
)
from cakeflow.forward.fact_tokens import FactBatch
from cakeflow.forward.keys import FactReader
from cakeflow.forward.tokens import EditBatch, TextBatch
from cakeflow.journal.journal import Journal
from cakeflow.journal.schema import FactBody, Reason
from cakeflow.models.architecture import Role, Site
from cakeflow.solvers.base import Solver
from cakeflow.solvers.problem import LayerProblem, Update
from cakeflow.targets.base import SEARCH_REMEDY, Targets
from cakeflow.weighters.base import Weighter

Outcome = Literal["warn", "error"]
"""What follows when a measurement falls below its limit."""


def checked_facts(
    label: str, values: Float[Tensor, "n width"], batch: TextBatch, layer: int
) -> Float[Tensor, "n width"]:
    """Return the values of a batch if all of them are finite.

    Args:
        label: Beginning of the error message: the name of the values and a verb.
        values: n x width, one row per fact.
        batch: n facts.
        layer: Index of the block that the values belong to.

    Raises:
        NumericalError: If some are not, naming the facts.
    """
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        bad = (~finite).any(1).nonzero()[:, 0].tolist()
        example = float(values[~finite][0])
        raise NumericalError(
            f"layer {layer}, {batch.name(bad)}: {label} not finite ({example}); load the model in float32, or leave "
            "such requests out"
        )
    return values


@contextmanager
def naming(layer: int, batch: TextBatch) -> Iterator[None]:
    """Add layer and requests, which solvers do not know, to the message of a numerical error in the body."""
    try:
        yield
    except (NumericalError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        message = str(error).removeprefix(f"layer {layer}: ")
        raise NumericalError(f"layer {layer}, {batch.name(range(len(batch)))}: {message}") from error


def solved(solver: Solver, problem: LayerProblem, layer: int, batch: TextBatch, limit: float) -> Update:
    """Solve the problem of one layer and check the update.

    Args:
        solver: Solver to call.
        problem: Problem of the layer.
        layer: Index of the block.
        batch: n facts.
        limit: Largest Frobenius norm of the update, in norms of the weight.

    Raises:
        ShapeError: If the update does not fit the weight.
        NumericalError: If the solver fails, or its update is not finite or too large; layer and requests are named.
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


def checked_parts(batch: TextBatch, size: int, *, strict: bool) -> list[list[int]]:
    """Return places of facts whose target values are searched together: those of one value are, wherever they stand.

    Args:
        batch: n facts.
        size: Most facts in one part.
        strict: Whether facts of one target value that are more than that are an error, rather than a larger part.

    Raises:
        ConfigError: If facts of one target value do not fit into one part.
    """
    parts: list[list[int]] = [[]]
    for group in _groups(batch.value_groups()):
        if strict and len(group) > size:
            raise ConfigError(
                f"{batch.name(group)}: their keys coincide, or are those of one fact in and outside a chat, so they "
                f"need one target value, but memory_budget allows {size} facts in one search; raise memory_budget, or "
                "set chat to false"
            )
        if parts[-1] and len(parts[-1]) + len(group) > size:
            parts.append([])
        parts[-1] += group
    for group in _groups(batch.key_groups()):
        if len({batch.numbers[i] for i in group}) > 1:
            warnings.warn(
                f"{batch.name(group)}: their keys coincide, because the prompts are the same up to the end of the "
                "subject; one target value is searched that serves all of them",
                SharedKeyWarning,
                stacklevel=2,
            )
    return parts


def _groups(first: Sequence[int]) -> list[list[int]]:
    """Return the places of each group, where ``first`` has the first place of its group for each place."""
    groups: dict[int, list[int]] = {}
    for i, place in enumerate(first):
        groups.setdefault(place, []).append(i)
    return list(groups.values())


def warn_replaced(batch: TextBatch, facts: Sequence[int], journal: Journal, names: Collection[str]) -> None:
    """Warn of facts of earlier batches, with other prompts, whose value a new one replaces, because they have one key.

    Args:
        batch: The facts that are edited.
        facts: Places of those that have an earlier fact's key.
        journal: The earlier batches.
        names: Hashes of the earlier facts.
    """
    texts = {name: each.text for step in journal for name, each in zip(step.hashes, step.requests, strict=False)}
    edited = {request.text for request in batch.requests}  # to edit a fact anew is no surprise
    earlier = [repr(text) for text in (texts.get(name, name[:16]) for name in names) if text not in edited]
    if not earlier:
        return
    warnings.warn(
        f"{batch.name(facts)}: their keys are those of earlier facts, whose values they replace: {listed(earlier, 3)}; "
        "where an earlier fact is to stay, edit it again together with the new one",
        SharedKeyWarning,
        stacklevel=2,
    )


def checked_weights(weighter: Weighter, weights: Tensor, facts: int, layers: Sequence[int]) -> Float[Tensor, "*n l"]:
    """Return the weights of a weighter in float64.

    Raises:
        ShapeError: If their shape is neither (l) nor (n, l), or they are not finite, negative or all 0.
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
    allocator: Allocator, share: Tensor, residual: Float[Tensor, "n d_out"], context: LayerContext
) -> Float[Tensor, "n d_out"]:
    """Return an allocator's share of the remaining residual for one layer.

    Raises:
        ShapeError: If its shape differs from the residual's, or the shares break the contract of ``ShareAllocator``.
        NumericalError: If it is not finite.
    """
    if share.shape != residual.shape:
        raise ShapeError(f"{_name(allocator)}: expected {tuple(residual.shape)}, got {tuple(share.shape)}")
    if not bool(torch.isfinite(share).all()):
        bad = (~torch.isfinite(share)).any(1).nonzero()[:, 0].tolist()
        raise NumericalError(
            f"layer {context.site.layer}, {context.name(bad)}: {_name(allocator)}: the share is not finite"
        )
    if isinstance(allocator, ShareAllocator):
        _check_shares(allocator, context)
    return share


def _check_shares(allocator: ShareAllocator, context: LayerContext) -> None:
    shares = allocator.shares(context.weights)
    if shares.shape != context.weights.shape:
        raise ShapeError(
            f"{_name(allocator)}: {tuple(context.weights.shape)} weights gave {tuple(shares.shape)} shares"
        )
    active = context.weights > 0  # a fact may give a layer no weight, and then no share
    if not bool((((shares > 0) | ~active) & (shares >= 0) & (shares <= 1 + 1e-12)).all()):
        raise ShapeError(f"{_name(allocator)}: shares must lie in (0, 1], got {shares.tolist()}")
    if allocator.residual_at == "last" and bool((((shares[..., -1] - 1).abs() > 1e-12) & active[..., -1]).any()):
        raise ShapeError(
            f"{_name(allocator)}: the last layer must take the whole remaining residual (a share of 1), got "
            f"{shares[..., -1].tolist()}"
        )


def require_search(targets: Targets, batch: TextBatch, layer: int) -> None:
    """Check that not all searches led away from their facts. ``NumericalError``, with what helps, if they did."""
    if targets.away is not None and bool(targets.away.all()):
        raise NumericalError(
            f"{batch.name(range(len(batch)))}: no search for a target value at layer {layer} lowered its target's NLL; "
            f"{SEARCH_REMEDY}"
        )


def checked_update(solver: Solver, update: Update, problem: LayerProblem, layer: int) -> Update:
    """Return a solver's update.

    Raises:
        ShapeError: If it does not fit the weight.
        NumericalError: If it is not finite.
    """
    for part in (update, update.deferred):
        if part is None:
            continue
        (n, d_in), (_, d_out) = problem.keys.shape, problem.residual.shape
        n = (n if part.gradients is None else len(part.gradients)) + part.extra  # rows of facts or tokens, and decoys
        expected = ((d_out, d_in),) if part.left is None else ((n, d_in), (n, d_out))
        factors = [each for each in (part.right, part.left) if each is not None]
        shapes = tuple(tuple(each.shape) for each in factors)
        if shapes != expected:
            raise ShapeError(f"{_name(solver)}: layer {layer} needs an update of shape {expected}, got {shapes}")
        if not all(bool(torch.isfinite(each).all()) for each in factors):
            raise NumericalError(
                f"layer {layer}: {_name(solver)}: the update has values that are not finite; set ridge higher"
            )
    return update


def arrival(
    reader: FactReader, targets: Mapping[Site, Targets], role: Role
) -> tuple[Float[Tensor, "n d_out"], Float[Tensor, " n"]]:
    """Measure the part of each fact's searched change that arrived at its value site.

    Args:
        reader: Reader of the n facts, at or below the first value site.
        targets: Value site -> target values, in ascending order.
        role: The edited projection.

    Returns:
        What remains at the last value site, and the part that arrived at the worst one; 1 is all of it.
    """
    arrived = torch.ones(reader.prompts.size, dtype=torch.float64, device=reader.weights.device)
    for value_site, each in targets.items():
        remaining = each.values - reader.values(Site(value_site.layer, role), value_site)
        searched = (each.values - each.initial).norm(dim=1)
        share = 1 - remaining.norm(dim=1) / searched
        arrived = torch.where(searched > 0, torch.minimum(arrived, share), arrived)
    return remaining, arrived


REMEDIES: dict[Reason, str] = {
    "blocked": "every token they can be written at carries a massive activation; put a text in front of the prompt",
    "arrival": "too little of the searched change arrived; lower statistics.cov_weight or ridge, or edit fewer at once",
    "search": "the search did not make the target likely; raise targets.steps or targets.lr",
    "interference": "changes of other facts reach the tokens behind them; edit fewer facts at once, or raise rounds",
}


def warn_not_taken(batch: EditBatch, outcomes: Sequence[FactBody]) -> None:
    """Warn of the facts of a batch that did not take, with reasons and remedies."""
    for reason, remedy in REMEDIES.items():
        if failed := [i for i, each in enumerate(outcomes) if not each.taken and each.reason == reason]:
            best = max(outcomes[i].probability for i in failed)
            warnings.warn(
                f"{batch.name(failed)}: not taken (probability of the target at most {best:.2g}): {remedy}",
                NotTakenWarning,
                stacklevel=2,
            )


def warn_blocked(batch: FactBatch) -> None:
    """Warn of the facts of a batch that cannot be written alone, before anything is searched."""
    if blocked := [i for i, each in enumerate(batch.massive) if each is not None]:
        largest = max(batch.massive[i] or 0.0 for i in blocked)
        warnings.warn(
            f"{batch.name(blocked)}: blocked: {REMEDIES['blocked']} (its norm is up to {largest:.0f} times the median)",
            BlockedWarning,
            stacklevel=2,
        )


def check_arrival(arrived: Sequence[float], batch: TextBatch, least: float, outcome: Outcome) -> None:
    """Warn of facts of whose searched change too little arrived, so that no fact fails to take unnoticed.

    Args:
        arrived: The part that arrived.
        batch: n facts.
        least: Least part that passes.
        outcome: Whether less is a warning or an error.

    Raises:
        NumericalError: If a fact has less and the outcome is ``error``.
    """
    if bad := [i for i, each in enumerate(arrived) if not each >= least]:
        message = (
            f"{batch.name(bad)}: {min(arrived[i] for i in bad):.0%} of the searched change arrived, and min_arrival is "
            f"{least:.0%}, so the edit may not have taken; lower statistics.cov_weight or the solver's ridge, edit "
            "fewer facts at once, or edit other layers"
        )
        if outcome == "error":
            raise NumericalError(message)
        warnings.warn(message, ArrivalWarning, stacklevel=2)


def _name(part: object) -> str:
    return f"{type(part).__module__}.{type(part).__qualname__}"
