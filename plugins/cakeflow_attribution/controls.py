"""Controls: if scores matter, worse scores must edit worse (CAKE, tables 7 and 8)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.errors import ConfigError
from cakeflow.forward import TextBatch
from cakeflow.models import LanguageModel
from cakeflow.weighters import Scores, Weighter


@dataclass(frozen=True)
class Control(Weighter):
    """Weights of ``inner`` after a random change of its scores; subclasses define ``change``.

    Attributes:
        inner: The weighter whose scores are changed.
        seed: Seed of the change, which is the same for every batch.
    """

    inner: Scores = field(default_factory=Scores)
    seed: int = 0

    @abstractmethod
    def change(self, scores: Float[Tensor, "*n l"]) -> Float[Tensor, "*n l"]:
        """Return worse scores."""

    def check(self, layers: Sequence[int]) -> None:
        """Refuse what ``inner`` refuses."""
        self.inner.check(layers)

    def within(self, max_bytes: float | None) -> Control:
        """Give ``inner`` a limit of memory."""
        return replace(self, inner=self.inner.within(max_bytes))

    def prepare(self, lm: LanguageModel, layers: Sequence[int]) -> Control:
        """Prepare ``inner``."""
        return replace(self, inner=self.inner.prepare(lm, layers))

    def with_scores(self, scores: dict[int, float] | None) -> Control:
        """Give ``inner`` a model's scores."""
        return replace(self, inner=self.inner.with_scores(scores))

    def weigh(self, lm: LanguageModel, batch: TextBatch, layers: Sequence[int]) -> Float[Tensor, "*n l"]:
        """Return the weights that ``inner`` derives from the changed scores."""
        return self.inner.weights(lm, self.change(self.inner.score(lm, batch, layers)), layers)


@dataclass(frozen=True)
class Shuffled(Control):
    """Scores permuted among the layers: the weights are as uneven as before, at other layers (CAKE, table 7)."""

    def change(self, scores: Float[Tensor, "*n l"]) -> Float[Tensor, "*n l"]:
        """Permute the scores; the permutation never leaves all layers in place."""
        generator, stay = torch.Generator().manual_seed(self.seed), torch.arange(scores.shape[-1])
        order = stay
        while len(stay) > 1 and torch.equal(order, stay):
            order = torch.randperm(len(stay), generator=generator)
        return scores[..., order]


@dataclass(frozen=True)
class Noisy(Control):
    """Scores with Gaussian noise (CAKE, table 8, has 0.05, 0.1 and 0.15).

    Attributes:
        sigma: Standard deviation of the noise, in units of the scores.
    """

    sigma: float = 0.05

    def __post_init__(self) -> None:
        if not self.sigma >= 0:
            raise ConfigError(f"sigma must be 0 or more, got {self.sigma}")

    def change(self, scores: Float[Tensor, "*n l"]) -> Float[Tensor, "*n l"]:
        """Add the noise, one number per layer."""
        noise = torch.randn(scores.shape[-1], generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        return scores + self.sigma * noise.to(scores)
