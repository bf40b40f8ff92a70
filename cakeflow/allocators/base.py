"""The allocator slot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, final

from jaxtyping import Float
from torch import Tensor

from cakeflow.forward.jacobian import Chain
from cakeflow.models.architecture import Site

Anchor = Literal["last", "self"]


@dataclass(frozen=True, eq=False)
class Turn:
    """One layer's turn in the walk.

    Attributes:
        site: The projection about to be edited.
        anchor: Where the residual is measured.
        index: Position of this layer among the edited ones.
        weights: Weights of all edited layers, (n x) l.
        chain: What the layers from this one on do to the anchor; nothing is computed unless it is used.
    """

    site: Site
    anchor: Site
    index: int
    weights: Float[Tensor, "*n l"]
    chain: Chain | None = None


class Allocator(ABC):
    """Says what part of the remaining residual the layer in hand should produce.

    Contract: linear in the residual. ``anchor`` says where residuals are measured: ``last``, at the last edited
    layer, or ``self``, at each layer, which then gets target values of its own.
    """

    anchor: Anchor

    @abstractmethod
    def allocate(self, residual: Float[Tensor, "n d_out"], turn: Turn) -> Float[Tensor, "n d_out"]:
        """What this layer's output should change by.

        Args:
            residual: What is missing at the anchor now, measured after the layers before were edited.
            turn: Whose turn it is.
        """


class ShareAllocator(Allocator):
    """An allocator that is one number per layer; subclass this one and define ``shares``.

    Contract of ``shares``: a pure function of the weights; each share in (0, 1]; with ``anchor = "last"`` the last
    share is 1.
    """

    @abstractmethod
    def shares(self, weights: Float[Tensor, "*n l"]) -> Float[Tensor, "*n l"]:
        """Share of what is left that each layer takes when its turn comes."""

    @final
    def allocate(self, residual: Float[Tensor, "n d_out"], turn: Turn) -> Float[Tensor, "n d_out"]:
        """The share of this turn, times the residual."""
        return self.shares(turn.weights)[..., turn.index, None] * residual
