"""Edit score: one number for efficacy, generalization and specificity."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from cakeflow.metrics.preference import Rates


class EditScore(Rates):
    """Harmonic mean of efficacy, generalization and specificity (S in the ROME and MEMIT tables).

    Example:
        >>> import torch
        >>> metric = EditScore("exact")
        >>> metric.update(torch.zeros(4), torch.zeros(4), torch.tensor([True, True, True, False]),
        ...               record=torch.tensor([0, 0, 0, 0]), kind=torch.tensor([0, 1, 2, 2]))
        >>> metric.compute()  # 3 / (1/1 + 1/1 + 1/0.5)
        tensor(0.7500)
    """

    def compute(self) -> Float[Tensor, ""]:
        """Return the harmonic mean of the three rates, in [0, 1]; 0 if one is 0, nan if one could not be judged."""
        return len(self.kinds) / (self.records / self.total).sum()
