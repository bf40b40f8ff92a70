"""Padding and grouping of rows of different lengths for common forward passes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

GIB = 2**30
"""Bytes in a gibibyte."""


def pad(ids: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Int[Tensor, "rows time"]:
    """Stack ragged rows, padded on the right with token 0, which no token before it attends to."""
    width = max(map(len, ids))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in ids], device=device)


def plan(lengths: Sequence[int], max_tokens: int, slack: int = 32) -> list[list[int]]:
    """Group rows of similar length, with little padding and a limit on the tokens in a group.

    Args:
        lengths: Tokens in each row.
        max_tokens: Most tokens in a group, padding included; a longer row forms a group of its own.
        slack: Most padding tokens in a group; about what one more forward pass costs.

    Returns:
        Indices of the rows of each group, longest rows first.

    Example:
        >>> plan([3, 9, 3, 8], max_tokens=100, slack=2)
        [[1, 3], [0, 2]]
    """
    groups: list[list[int]] = []
    padding = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[groups[-1][0]] if groups else 0
        waste = padding + longest - lengths[index]
        if groups and waste <= slack and (len(groups[-1]) + 1) * longest <= max_tokens:
            groups[-1].append(index)
            padding = waste
        else:
            groups.append([index])
            padding = 0
    return groups
