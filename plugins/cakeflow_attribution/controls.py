"""Controls: if scores matter, worse scores must edit worse (CAKE, tables 7 and 8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.errors import ConfigError
from cakeflow.forward.tokens import TextBatch
from cakeflow.models.language import LanguageModel
from cakeflow.weighters import Scores


@dataclass(frozen=True)
class Shuffled(Scores):
    """Scores permuted among the layers: the weights are as uneven as before, at other layers (CAKE, table 7).

    Attributes:
        seed: Of the permutation, which is the same for every batch and never leaves all layers in place.
    """

    seed: int = 0

    def score(self, lm: LanguageModel, batch: TextBatch, layers: Sequence[int]) -> Float[Tensor, "*n l"]:
        """See ``Scores.score``."""
        generator, stay = torch.Generator().manual_seed(self.seed), torch.arange(len(layers))
        order = stay
        while len(layers) > 1 and torch.equal(order, stay):
            order = torch.randperm(len(layers), generator=generator)
        return super().score(lm, batch, layers)[..., order]


@dataclass(frozen=True)
class Noisy(Scores):
    """Scores with Gaussian noise (CAKE, table 8, has 0.05, 0.1 and 0.15).

    Attributes:
        sigma: Standard deviation of the noise, in units of the scores.
        seed: Of the noise, which is the same for every batch.
    """

    sigma: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sigma >= 0:
            raise ConfigError(f"sigma must be 0 or more, got {self.sigma}")

    def score(self, lm: LanguageModel, batch: TextBatch, layers: Sequence[int]) -> Float[Tensor, "*n l"]:
        """See ``Scores.score``."""
        scores = super().score(lm, batch, layers)
        generator = torch.Generator().manual_seed(self.seed)
        return scores + self.sigma * torch.randn(len(layers), generator=generator, dtype=torch.float64).to(scores)
