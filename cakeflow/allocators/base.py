"""The allocator slot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, final

from jaxtyping import Float
from torch import Tensor

from cakeflow.forward.jacobian import LinearMap
from cakeflow.models.architecture import Site

ResidualAt = Literal["last", "self"]


@dataclass(frozen=True, eq=False)
class LayerContext:
    """One layer's turn in the walk.

    Attributes:
        site: The projection about to be edited.
        value_site: Where target values are set and residuals measured.
        index: Position of this layer among the edited ones.
        weights: Weights of all edited layers, (n x) l.
        linear_map: What the layers from this one on do to the value site; nothing is computed unless it is used.
    """

    site: Site
    value_site: Site
    index: int
    weights: Float[Tensor, "*n l"]
    linear_map: LinearMap | None = None


class Allocator(ABC):
    """Says what part of the remaining residual the layer in hand should produce.

    Contract: linear in the residual. ``residual_at`` says where residuals are measured: ``last``, at the last edited
    layer, or ``self``, at each layer, which then gets target values of its own.
    """

    residual_at: ResidualAt

    @abstractmethod
    def allocate(self, residual: Float[Tensor, "n d_out"], context: LayerContext) -> Float[Tensor, "n d_out"]:
        """What this layer's output should change by.

        Args:
            residual: What is missing at the value site now, measured after the layers before were edited.
            context: Whose turn it is.
        """


class ShareAllocator(Allocator):
    """An allocator that is one number per layer; subclass this one and define ``shares``.

    Contract of ``shares``: a pure function of the weights; each share in (0, 1]; with ``residual_at = "last"`` the last
    share is 1.
    """

    @abstractmethod
    def shares(self, weights: Float[Tensor, "*n l"]) -> Float[Tensor, "*n l"]:
        """Share of what is left that each layer takes when its turn comes."""

    @final
    def allocate(self, residual: Float[Tensor, "n d_out"], context: LayerContext) -> Float[Tensor, "n d_out"]:
        """The share of this turn, times the residual."""
        return self.shares(context.weights)[..., context.index, None] * residual
