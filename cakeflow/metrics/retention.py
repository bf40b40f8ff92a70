"""Retention: success of edits 1 to k, measured after n >= k edits."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric


class Retention(Metric):
    """Mean success of all edits so far, overall and for each edit batch.

    Args:
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = Retention()
        >>> metric.update(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 0, 1]))
        >>> metric.compute(), metric.by_batch()
        (tensor(0.6667), tensor([0.5000, 1.0000]))
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    success: list[Tensor]
    batch: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("success", [], dist_reduce_fx="cat")
        self.add_state("batch", [], dist_reduce_fx="cat")

    def update(self, success: Float[Tensor, " n"], batch: Int[Tensor, " n"]) -> None:
        """Add the success of n edits, in [0, 1], and the batch of each."""
        self.success.append(success)
        self.batch.append(batch)

    def compute(self) -> Float[Tensor, ""]:
        """Return the mean over edits; nan without any."""
        return torch.cat([torch.empty(0), *self.success]).mean()

    def by_batch(self) -> Float[Tensor, " batches"]:
        """Return the mean over the edits of each batch."""
        success, batch = torch.cat(list(self.success)), torch.cat(list(self.batch))
        return torch.zeros(int(batch.max()) + 1).index_add(0, batch, success.float()) / torch.bincount(batch)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one or several values."""
        return self._plot(val, ax)
