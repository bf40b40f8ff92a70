"""Rules that end the search of a fact before its steps are used up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from cakeflow.errors import require_positive
from cakeflow.targets.objective import ObjectiveValue


class StopRule(ABC):
    """Decides fact by fact when a search is done; subclasses are frozen dataclasses."""

    @abstractmethod
    def met(self, value: ObjectiveValue) -> Bool[Tensor, " n"]:
        """Return True for facts that are done at this value of the objective."""


@dataclass(frozen=True)
class LossBelow(StopRule):
    """Done once the whole objective is below a limit.

    Attributes:
        loss: Limit in nats.
    """

    loss: float = 0.05

    def met(self, value: ObjectiveValue) -> Bool[Tensor, " n"]:
        """Compare the loss with the limit."""
        return value.loss < self.loss


@dataclass(frozen=True)
class SolvedAndNear(StopRule):
    """Done as well once the target is the most likely text and the essence has hardly moved (PMET's code).

    Attributes:
        kl: Limit of the term ``essence`` in nats, its factor left out; a search without that term counts as near.
        inner: Rule that is enough by itself.
    """

    kl: float = 0.01
    inner: StopRule = LossBelow()

    def __post_init__(self) -> None:
        require_positive("SolvedAndNear", self, "kl")

    def met(self, value: ObjectiveValue) -> Bool[Tensor, " n"]:
        """Apply the inner rule, and the limit to solved facts."""
        near = value.terms["essence"] < self.kl if "essence" in value.terms else True
        return self.inner.met(value) | (value.solved & near)
