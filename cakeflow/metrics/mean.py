"""The mean of one number for each item, shares among them: the base of metrics that judge items one by one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric


class Mean(Metric):
    """Mean over items of one number each, such as the share of those that succeed.

    Subclasses define ``update``, which hands the numbers of further items to ``add``.

    Attributes:
        total: Sum of the numbers.
        items: Number of items.

    Args:
        kwargs: Arguments of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound: float | None = 1.0
    total: Tensor
    items: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("items", torch.tensor(0), dist_reduce_fx="sum")

    def add(self, values: Tensor | Iterable[float]) -> None:
        """Add the numbers of some items; truth values count as 1 and 0."""
        numbers = values if isinstance(values, Tensor) else torch.tensor([*map(float, values)], dtype=torch.float64)
        self.total += numbers.double().sum().to(self.total.device)
        self.items += numbers.numel()

    def compute(self) -> Float[Tensor, ""]:
        """Return the mean; nan without items."""
        return (self.total / self.items).float()

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one or several values."""
        return self._plot(val, ax)
