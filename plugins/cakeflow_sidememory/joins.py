"""Joins of several changes of one weight into one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.errors import ConfigError

Join = Literal["ties", "sign", "magnitude", "magnitude_norm", "linear", "slerp"]
"""TIES (Yadav et al. 2023); its election of signs alone; trimming alone, summed or averaged; halfway to the first."""


def join(
    base: Float[Tensor, "d_out d_in"],
    memories: Sequence[Float[Tensor, "d_out d_in"]],
    weights: Sequence[float],
    how: Join = "ties",
    density: float = 0.53,
) -> Float[Tensor, "d_out d_in"]:
    """Return one weight that has the changes of several.

    As in WISE's code: every change is trimmed to its largest entries, an entry's sign is elected by the weighted sum,
    and the weighted mean of the changes that agree with it is taken. ``linear`` and ``slerp`` look at the first memory
    only, as the code does.

    Args:
        base: The weight that all started from.
        memories: The changed weights.
        weights: Weight of each.
        how: The rule.
        density: Share of the entries that trimming keeps, above 0 and at most 1; ties go to the first entries.

    Raises:
        ConfigError: If there is nothing to join, or weights and memories differ in number.
    """
    if not memories or len(memories) != len(weights) or not 0 < density <= 1:
        raise ConfigError(
            f"{len(memories)} memories with {len(weights)} weights and density={density}: give at least one memory, a "
            "weight for each, and a density above 0 and at most 1"
        )
    if how in ("linear", "slerp"):
        return _halfway(base, memories[0], how)
    changes = torch.stack([memory - base for memory in memories])
    if how != "sign":
        changes = torch.stack([trim(change, density) for change in changes])
    weighted = changes * torch.tensor(weights, dtype=base.dtype, device=base.device)[:, None, None]
    factors = torch.tensor(weights, dtype=base.dtype, device=base.device)[:, None, None].expand_as(changes)
    if how == "magnitude":
        return base + weighted.sum(0)
    if how == "magnitude_norm":
        return base + weighted.sum(0) / sum(weights)
    sign = torch.where(weighted.sum(0) >= 0, 1.0, -1.0).to(base)
    agree = changes.sign() == sign
    return base + _quotient((weighted * agree).sum(0), (factors * agree).sum(0))


def trim(change: Float[Tensor, "d_out d_in"], density: float) -> Float[Tensor, "d_out d_in"]:
    """Return the change with 0 in the place of all but its largest entries, int(density N) of N; ranked in float32."""
    flat = change.flatten()
    order = flat.abs().float().cpu().sort(descending=True, stable=True).indices[: int(density * flat.numel())]
    kept = torch.zeros_like(flat)
    kept[order.to(flat.device)] = flat[order.to(flat.device)]
    return kept.view_as(change)


def _quotient(total: Tensor, count: Tensor) -> Tensor:
    return torch.where(count != 0, total / torch.where(count != 0, count, 1), 0)


def _halfway(base: Tensor, memory: Tensor, how: Join) -> Tensor:
    if how == "linear":
        return (base + memory) / 2
    directions = [each / each.norm() for each in (base, memory)]
    cosine = (directions[0] * directions[1]).sum()
    if cosine.abs() > 0.9995:
        return (base + memory) / 2
    angle = cosine.arccos()
    factor = (angle / 2).sin() / angle.sin()
    result: Tensor = factor * (base + memory)
    return result
