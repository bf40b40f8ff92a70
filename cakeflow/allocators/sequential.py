"""Sequential allocation: MEMIT, AlphaEdit, PMET, BLUE, ROME and CAKE as one formula with different weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.allocators.base import ResidualAt, ShareAllocator
from cakeflow.errors import ConfigError, require_choice


def shares_from_fractions(fractions: Float[Tensor, "*n l"]) -> Float[Tensor, "*n l"]:
    """Turn fractions of the original residual into shares of the remaining one: ``f_i / sum_{j >= i} f_j``.

    This is CAKE's sequential rule (eq. 6): with weights as fractions, the share of layer l is
    w_l / sum_{k >= l} w_k. Only ratios matter, so the largest entry is scaled to 1 first; equal weights then give
    exactly 1/remaining.

    Example:
        >>> import torch
        >>> shares_from_fractions(torch.ones(4)).tolist()
        [0.25, 0.3333333432674408, 0.5, 1.0]
    """
    scaled = fractions / fractions.amax(-1, keepdim=True)
    remaining = scaled.flip(-1).cumsum(-1).flip(-1)
    return scaled / remaining.clamp_min(torch.finfo(scaled.dtype).tiny)  # trailing fractions of 0 have the share 0


@dataclass(frozen=True)
class Sequential(ShareAllocator):
    """Shares ``(w_l / sum_{k >= l} w_k) ** power`` of the remaining residual (CAKE eq. 6 with power 1).

    Uniform weights with power 1 are MEMIT and AlphaEdit, with power 0.5 PMET's 1/sqrt(remaining); power 0 with
    ``residual_at="self"`` is BLUE, with ``forward`` it is FE's forward replay; a single weight is ROME.

    Attributes:
        power: 1 for the weighted split, 0.5 for its square root, 0 for the whole residual at every layer.
        residual_at: Site of the residuals: the ``last`` edited layer, or each layer itself, whose target values are
            searched there (``self``) or carried to it from the first layer (``forward``).
    """

    power: float = 1.0
    residual_at: ResidualAt = "last"

    def __post_init__(self) -> None:
        if not 0 <= self.power <= 1:
            raise ConfigError(f"power must lie in [0, 1], got {self.power}")
        require_choice("residual_at", self.residual_at, ResidualAt)

    def shares(self, weights: Float[Tensor, "*n l"]) -> Float[Tensor, "*n l"]:
        """Return the power of each layer's share of the remaining weights."""
        return shares_from_fractions(weights) ** self.power
