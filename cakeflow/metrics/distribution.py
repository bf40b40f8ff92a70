"""Specificity without a truth: how far next-token distributions moved, whatever the right answer is (2601.17343).

The share of neighbors that keep their answer rises when edits fail. Divergence and overlap compare the model with
itself before the edit: a failed edit shows as no change, and a change shows where no answer changed yet.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import KLDivergence, Metric, MetricCollection

from cakeflow.errors import ConfigError
from cakeflow.metrics.mean import Mean

TOPS = (1, 5, 10)
"""Numbers of most likely tokens whose overlap is measured."""


def top_overlap(p: Float[Tensor, "n vocabulary"], q: Float[Tensor, "n vocabulary"], k: int) -> Float[Tensor, " n"]:
    """Compute the share of the k most likely tokens that two distributions have in common.

    Args:
        p: (Log-)probabilities before.
        q: (Log-)probabilities after.
        k: Number of tokens.

    Raises:
        ConfigError: If k is not between 1 and the size of the vocabulary.

    Example:
        >>> top_overlap(torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.5, 0.2, 0.3]]), 2)
        tensor([0.5000])
    """
    if not 1 <= k <= p.shape[-1]:
        raise ConfigError(f"k must be between 1 and the {p.shape[-1]} tokens of the vocabulary, got {k}")
    before, after = (torch.topk(each, k, dim=-1).indices for each in (p, q))
    return (before[:, :, None] == after[:, None, :]).any(2).float().mean(1)


class TopOverlap(Mean):
    """Mean share of the k most likely next tokens that two models have in common.

    Args:
        k: Number of tokens.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = TopOverlap(1)
        >>> metric.update(torch.tensor([[0.6, 0.4], [0.6, 0.4]]), torch.tensor([[0.7, 0.3], [0.1, 0.9]]))
        >>> metric.compute()
        tensor(0.5000)
    """

    def __init__(self, k: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.k = k

    def update(self, p: Float[Tensor, "n vocabulary"], q: Float[Tensor, "n vocabulary"]) -> None:
        """Add n pairs of (log-)probabilities, before and after."""
        self.add(top_overlap(p, q, self.k))


def prediction_shift() -> MetricCollection:
    """Return the divergence in nats and the overlaps, for log-probabilities before (``p``) and after (``q``).

    ``kl`` is torchmetrics' own, KL(before | after); ``top1``, ``top5`` and ``top10`` are overlaps; of each rank alone.
    """
    metrics: dict[str, Metric | MetricCollection] = {"kl": KLDivergence(log_prob=True, sync_on_compute=False)}
    metrics |= {f"top{k}": TopOverlap(k, sync_on_compute=False) for k in TOPS}
    return MetricCollection(metrics, compute_groups=False)
