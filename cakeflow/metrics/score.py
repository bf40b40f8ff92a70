"""One number for an edit."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric

from cakeflow.metrics.preference import Form, checked_form, record_means, success
from cakeflow.scoring import KINDS


class EditScore(Metric):
    """Harmonic mean of efficacy, generalization and specificity (S in the ROME and MEMIT tables).

    Args:
        form: As in ``Efficacy``.
        kwargs: Passed on to ``torchmetrics.Metric``.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    total: Tensor
    records: Tensor

    def __init__(self, form: Form = "probability", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.form = checked_form(form)
        self.add_state("total", torch.zeros(len(KINDS)), dist_reduce_fx="sum")
        self.add_state("records", torch.zeros(len(KINDS)), dist_reduce_fx="sum")

    def update(
        self,
        wanted: Float[Tensor, " p"],
        rival: Float[Tensor, " p"],
        correct: Bool[Tensor, " p"],
        record: Int[Tensor, " p"],
        kind: Int[Tensor, " p"],
    ) -> None:
        """Take in the prompts of whole records."""
        value = success(wanted, rival, correct, self.form)
        for index in range(len(KINDS)):
            means = record_means(value[kind == index], record[kind == index])
            self.total[index] += means.sum()
            self.records[index] += len(means)

    def compute(self) -> Float[Tensor, ""]:
        """Harmonic mean of the three rates, in [0, 1]; 0 if one is 0, nan if one could not be judged."""
        return len(KINDS) / (self.records / self.total).sum()

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one or several values; see ``torchmetrics.Metric``."""
        return self._plot(val, ax)
