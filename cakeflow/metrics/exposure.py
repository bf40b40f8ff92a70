"""What a change of weights gives away about the subjects that were edited (2602.10134).

The closed forms write ``D = R K^T (C + ...)^-1``, so the rows of ``D C`` span the keys of the edited facts: whoever has
the base model, the change and second moments can ask of any name whether its key lies there.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric

from cakeflow.errors import ShapeError

RANK_TOLERANCE = 1e-4
"""Singular values of a change below this part of its largest one are rounding: weights are float32 or coarser."""


def exposure(
    change: Float[Tensor, "d_out d_in"], keys: Float[Tensor, "m d_in"], moment: Float[Tensor, "d_in d_in"]
) -> Float[Tensor, " m"]:
    """Compute how much of each key lies in the row space of a change, seen through the second moment.

    With ``C = V diag(c) V^T`` and whitened keys ``C^-1/2 k`` it is the norm of their part in the row space of
    ``D C^1/2``, over their own norm: 1 for a key that was written, near ``sqrt(rank / d_in)`` for one that was not.

    Args:
        change: D, edited less unedited weight.
        keys: Keys of m candidates in the unedited model.
        moment: C, or any estimate of it.

    Returns:
        One number in [0, 1] for each candidate; 0 everywhere for a change of nothing.

    Raises:
        ShapeError: If the widths differ.
    """
    width = change.shape[-1]
    if keys.shape[-1] != width or moment.shape != (width, width):
        raise ShapeError(
            f"a change {tuple(change.shape)} needs keys m x {width} and a second moment {width} x {width}, got "
            f"{tuple(keys.shape)} and {tuple(moment.shape)}"
        )
    values, vectors = torch.linalg.eigh(moment.double())
    values = values.clamp_min(float(values.max()) * 1e-6)  # where C is nearly 0, its inverse would say everything
    rows = (change.double() @ vectors) * values.sqrt()
    whitened = (keys.double() @ vectors) / values.sqrt()
    _, singular, basis = torch.linalg.svd(rows, full_matrices=False)
    basis = basis[singular > RANK_TOLERANCE * singular[0]]
    lengths = whitened.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    shares: Tensor = (whitened @ basis.T).norm(dim=1) / lengths
    return shares


class SubjectRecall(Metric):
    """Share of the edited subjects among as many candidates of the highest exposure: 1 gives all of them away.

    Args:
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = SubjectRecall()
        >>> metric.update(torch.tensor([0.9, 0.1, 0.8, 0.2]), torch.tensor([True, True, False, False]))
        >>> metric.compute()
        tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    scores: list[Tensor]
    edited: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("edited", [], dist_reduce_fx="cat")

    def update(self, scores: Float[Tensor, " m"], edited: Bool[Tensor, " m"]) -> None:
        """Add the exposure of candidates, and whether each was edited."""
        self.scores.append(scores)
        self.edited.append(edited)

    def compute(self) -> Float[Tensor, ""]:
        """Return the recall, in [0, 1]; nan if no candidate was edited."""
        scores, edited = torch.cat(list(self.scores)), torch.cat(list(self.edited))
        count = int(edited.sum())
        return edited[scores.topk(count).indices].float().mean()

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one or several values."""
        return self._plot(val, ax)
