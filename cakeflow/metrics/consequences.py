"""Metrics of what follows from edits: lists of true objects."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from cakeflow.errors import ShapeError


class ObjectShift(Metric):
    """What a round of edits leaves of a list of true objects (our reading of "Unveiling the Pitfalls", ICLR 2024).

    ``distortion`` is the Jensen-Shannon divergence, in nats, of the distributions over the objects; ``ignored`` the
    share of the objects beside the edited one that lost probability; ``failed`` the share of lists of which more than
    half did.

    Args:
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = ObjectShift()
        >>> metric.update(torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.0, -2.0, -0.5]), edited=0)
        >>> float(metric.compute()["ignored"]), float(metric.compute()["failed"])
        (0.5, 0.0)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    sums: Tensor
    lists: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("lists", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, before: Float[Tensor, " objects"], after: Float[Tensor, " objects"], edited: int) -> None:
        """Add a list.

        Args:
            before: Log-probability of each object in the unedited model.
            after: The same in the edited model.
            edited: Place of the object that was edited away and back.

        Raises:
            ShapeError: If there are fewer than two objects, or not as many before as after.
        """
        if before.shape != after.shape or before.ndim != 1 or len(before) < 2:
            raise ShapeError(
                f"before and after need one log-probability for each of two objects or more, got shapes "
                f"{tuple(before.shape)} and {tuple(after.shape)}"
            )
        others = torch.arange(len(before)) != edited
        ignored = (before > after)[others].double().mean()
        self.sums += torch.stack([jensen_shannon(before, after), ignored, (ignored > 0.5).double()])
        self.lists += 1

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Return the means over lists, by name; nan without any."""
        return dict(zip(("distortion", "ignored", "failed"), (self.sums / self.lists).float(), strict=True))

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one or several values."""
        return self._plot(val, ax)


def jensen_shannon(before: Float[Tensor, " n"], after: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Compute the Jensen-Shannon divergence, in nats, of two distributions that are given up to a factor, as logs."""
    p, q = before.double().log_softmax(0), after.double().log_softmax(0)
    middle = torch.logaddexp(p, q) - torch.tensor(2.0, dtype=torch.float64).log()
    return 0.5 * ((p.exp() * (p - middle)).sum() + (q.exp() * (q - middle)).sum())
