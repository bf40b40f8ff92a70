"""The loss of one edit of a side memory: the likelihood of its target, and the margin of its distances."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.errors import ConfigError

OTHERS_BELOW, OWN_ABOVE = 5.0, 20.0
"""Bounds of rehearsed edits, literals of WISE's code: those of other shards below, of the current one above."""


@dataclass(frozen=True)
class Margin:
    """Bounds that keep the distances of edited and of irrelevant texts apart; WISE (arXiv 2405.14768), Eq. 5.

    Attributes:
        alpha: Most distance of an irrelevant text.
        beta: Least distance of an edited one.
        gamma: Least difference of both.

    Raises:
        ConfigError: If a bound is negative, or no finite number.
    """

    alpha: float = 5.0
    beta: float = 20.0
    gamma: float = 10.0

    def __post_init__(self) -> None:
        if not all(0 <= bound < inf for bound in (self.alpha, self.beta, self.gamma)):
            raise ConfigError(f"alpha={self.alpha}, beta={self.beta}, gamma={self.gamma}: bounds must be at least 0")

    def __call__(self, edited: Float[Tensor, " rows"], irrelevant: Float[Tensor, " others"]) -> Tensor:
        """Return the sum of the three mean violations, those of the difference over all pairs of rows."""
        return (
            violation(irrelevant[None] - edited[:, None] + self.gamma)
            + violation(irrelevant - self.alpha)
            + violation(self.beta - edited)
        )


def violation(values: Tensor) -> Tensor:
    """Return the mean of the positive entries alone; 0 if there is none. The paper has the sum of all."""
    positive = values > 0
    mean: Tensor = (values * positive).sum() / positive.sum().clamp_min(1)
    return mean


def likelihood_loss(losses: Float[Tensor, " labels"], rows: Tensor, count: int, extra: int = 0) -> Float[Tensor, ""]:
    """Return the mean over rows of the mean negative log-likelihood of their labels.

    Args:
        losses: Negative log-likelihood of each label.
        rows: Row of each label.
        count: Number of rows.
        extra: Added to each row's number of labels: 1 in WISE's code, whose mask begins a position early.
    """
    total = losses.new_zeros(count).index_add(0, rows, losses)
    loss: Tensor = (total / (torch.bincount(rows, minlength=count) + extra)).mean()
    return loss
