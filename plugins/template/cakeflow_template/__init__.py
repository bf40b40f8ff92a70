"""An allocator with the same share of the remaining residual for every layer."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from cakeflow import ShareAllocator


@dataclass(frozen=True)
class Halving(ShareAllocator):
    """Each layer takes ``share`` of the remaining residual; the last one takes all of it.

    Attributes:
        share: Share of each layer but the last, in (0, 1].
        residual_at: Site of the residuals: the ``last`` edited layer, or each layer itself (``self``).
    """

    share: float = 0.5
    residual_at: str = "last"

    def shares(self, weights: Float[Tensor, "*n l"]) -> Float[Tensor, "*n l"]:
        """Return ``share`` for every layer but the last, which gets 1."""
        shares = weights.new_full(weights.shape, self.share)
        shares[..., -1] = 1
        return shares
