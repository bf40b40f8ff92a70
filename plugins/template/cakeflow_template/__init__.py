"""An allocator that gives every layer the same share of what the layers before it left."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from cakeflow import ShareAllocator


@dataclass(frozen=True)
class Halving(ShareAllocator):
    """Each layer takes ``share`` of what is left; the last one takes all of it.

    Attributes:
        share: In (0, 1].
        residual_at: Where residuals are measured: at the ``last`` edited layer, or at each layer itself (``self``).
    """

    share: float = 0.5
    residual_at: str = "last"

    def shares(self, weights: Float[Tensor, "*n l"]) -> Float[Tensor, "*n l"]:
        """See ``ShareAllocator.shares``."""
        shares = weights.new_full(weights.shape, self.share)
        shares[..., -1] = 1
        return shares
