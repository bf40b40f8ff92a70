"""Padding and grouping of rows of different lengths for common forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import torch
from jaxtyping import Int
from torch import Tensor

from cakeflow.errors import ConfigError
from cakeflow.models.architecture import Site
from cakeflow.models.language import LanguageModel

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


def alike(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two rows have in common at their beginning; for the least and the greatest row, all rows.

    Example:
        >>> alike((5, 1, 2), (5, 1, 3, 4)), alike((), (5,))
        (2, 0)
    """
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def pass_bytes(lm: LanguageModel, site: Site | None = None) -> int:
    """Return the bytes per token of a block's largest temporary tensors in a pass without gradients.

    Args:
        lm: The model.
        site: The projection with the widest inputs; by default the first block's.
    """
    return int((3 * lm.key_width(site or Site(0, "mlp_out")) + 8 * lm.width) * lm.embedding.element_size())


def logits_bytes(lm: LanguageModel) -> int:
    """Return the bytes of the logits of one position, with what is computed of them in float32."""
    return len(lm.embedding) * 12


def require_bytes(max_bytes: float, needed: float, work: str) -> None:
    """Check that the smallest part of some work fits.

    Raises:
        ConfigError: If it needs more than ``max_bytes``.
    """
    if needed > max_bytes:
        raise ConfigError(
            f"memory_budget is {max_bytes / GIB:.3g} GiB, but {work} takes about {needed / GIB:.3g} GiB beyond the "
            "model; shorten the longest text, or raise memory_budget"
        )
