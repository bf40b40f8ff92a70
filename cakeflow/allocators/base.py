"""The allocator slot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, final

from jaxtyping import Float
from torch import Tensor

from cakeflow.forward.jacobian import LinearMap
from cakeflow.models.architecture import Site

ResidualAt = Literal["last", "self", "forward"]


def _unnamed(facts: Iterable[int]) -> str:
    return f"facts {list(facts)} of the batch"


@dataclass(frozen=True, eq=False)
class LayerContext:
    """One layer of the walk over the edited layers.

    Attributes:
        site: The projection to edit.
        value_site: Site of the target values and residuals.
        index: Position of this layer among the edited ones.
        weights: Weights of all edited layers, (n x) l.
        linear_map: Map from output changes of this and the later layers to the value site; computed on first use.
        name: Names facts, given their places in the batch, for warnings and errors.
        numbers: What an allocator measures, by name; logged as ``layer{l}/{name}``.
    """

    site: Site
    value_site: Site
    index: int
    weights: Float[Tensor, "*n l"]
    linear_map: LinearMap | None = None
    name: Callable[[Iterable[int]], str] = _unnamed
    numbers: dict[str, float] = field(default_factory=dict)


class Allocator(ABC):
    """Split of the remaining residual among the edited layers.

    Contract: linear in the residual. ``residual_at`` is the site of the residuals: ``last``, the last edited layer;
    ``self``, each layer, which then gets target values of its own; or ``forward``, each layer, with target values that
    are searched at the first one and carried forward through the model as it is before the batch.
    """

    residual_at: ResidualAt

    @abstractmethod
    def allocate(self, residual: Float[Tensor, "n d_out"], context: LayerContext) -> Float[Tensor, "n d_out"]:
        """Return the change of this layer's output.

        Args:
            residual: Remaining residual at the value site, measured after the edits of the layers before.
            context: The layer.
        """


class ShareAllocator(Allocator):
    """An allocator with one share per layer; subclasses define ``shares``.

    Contract of ``shares``: a pure function of the weights; each share in (0, 1]; with ``residual_at = "last"`` the last
    share is 1.
    """

    @abstractmethod
    def shares(self, weights: Float[Tensor, "*n l"]) -> Float[Tensor, "*n l"]:
        """Return each layer's share of the residual that remains when it is edited."""

    @final
    def allocate(self, residual: Float[Tensor, "n d_out"], context: LayerContext) -> Float[Tensor, "n d_out"]:
        """Return the layer's share of the residual."""
        return self.shares(context.weights)[..., context.index, None] * residual
