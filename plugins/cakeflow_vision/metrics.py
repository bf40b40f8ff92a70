"""Metrics of edited classifiers: success, generalization within a group, locality, the mirrored and the worst group."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric

from cakeflow.errors import require_choice
from cakeflow.metrics import Mean

KINDS = ("rewrite", "generalization", "locality", "mirror")
"""Kinds of pictures, by their number: the edited ones, and those of the probes."""
Counting = Literal["clean", "official"]
"""Held-out pictures alone, or the group with the edited ones in it and one less, as in Where-to-Edit's code."""


class EditSuccess(Mean):
    """SR: the share of edited pictures that get their right label.

    Example:
        >>> metric = EditSuccess()
        >>> metric.update(torch.tensor([0, 0, 1]), torch.tensor([True, False, True]))
        >>> float(metric.compute())
        0.5
    """

    def update(self, kind: Int[Tensor, " n"], right: Bool[Tensor, " n"]) -> None:
        """Add n pictures: their kind, and whether each gets its right label."""
        self.add(right[kind == 0])


class GroupGeneralization(Mean):
    """GR: the share of pictures with the same error as the edited ones that get their right label.

    Args:
        counting: ``clean``, held-out pictures alone; ``official``, (right - 1) / N over a group that has the edited
            picture in it, as the code of Where-to-Edit (Yang et al., 2024) counts: at most (N - 1) / N.
        kwargs: Arguments of ``torchmetrics.Metric``.
    """

    def __init__(self, counting: Counting = "clean", **kwargs: Any) -> None:
        require_choice("counting", counting, Counting)
        super().__init__(**kwargs)
        self.counting = counting

    def update(self, kind: Int[Tensor, " n"], right: Bool[Tensor, " n"]) -> None:
        """Add n pictures."""
        official = self.counting == "official"
        self.add(right[(kind == 1) | (kind == 0)] if official else right[kind == 1])

    def compute(self) -> Float[Tensor, ""]:
        """Return the share."""
        return ((self.total - (1 if self.counting == "official" else 0)) / self.items).float()


class LabelLocality(Mean):
    """LR: the share of locality pictures that get the label that the unedited model gives, right or wrong.

    Args:
        sensitive: Take only pictures that the unedited model gets right with its top two probabilities less than this
            apart, as Where-to-Edit's sets are chosen; None takes all.
        kwargs: Arguments of ``torchmetrics.Metric``.
    """

    def __init__(self, sensitive: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sensitive = sensitive

    def update(
        self,
        kind: Int[Tensor, " n"],
        agrees: Bool[Tensor, " n"],
        margin: Float[Tensor, " n"],
        right_before: Bool[Tensor, " n"],
    ) -> None:
        """Add n pictures: whether each keeps its label, its margin before, and whether it was right then."""
        chosen = kind == 2
        self.add(agrees[chosen if self.sensitive is None else chosen & right_before & (margin < self.sensitive)])


class MirrorAccuracy(Mean):
    """Share of pictures of the group with the opposite error that get their right label."""

    def update(self, kind: Int[Tensor, " n"], right: Bool[Tensor, " n"]) -> None:
        """Add n pictures."""
        self.add(right[kind == 3])


class WorstGroup(Metric):
    """Accuracy of the group with the lowest, over all pictures that name a group and have a right label.

    Example:
        >>> metric = WorstGroup()
        >>> metric.update(torch.tensor([True, False, True]), torch.tensor([True] * 3), torch.tensor([7, 7, 9]))
        >>> float(metric.compute())
        0.5
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    right: list[Tensor]
    group: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("right", [], dist_reduce_fx="cat")
        self.add_state("group", [], dist_reduce_fx="cat")

    def update(self, right: Bool[Tensor, " n"], labelled: Bool[Tensor, " n"], group: Int[Tensor, " n"]) -> None:
        """Add n pictures: whether each gets its right label, has one, and the number of its group, -1 for none."""
        chosen = labelled & (group >= 0)
        self.right.append(right[chosen])
        self.group.append(group[chosen])

    def compute(self) -> Float[Tensor, ""]:
        """Return the lowest accuracy; nan without groups."""
        right = torch.cat([torch.empty(0), *(each.float() for each in self.right)])
        group = torch.cat([torch.empty(0, dtype=torch.long), *self.group])
        if not len(group):
            return torch.tensor(float("nan"))
        places, counts = group.unique(return_inverse=True, return_counts=True)[1:]
        rates: Tensor = torch.zeros(len(counts)).index_add(0, places, right) / counts
        return rates.min()

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one or several values."""
        return self._plot(val, ax)
