"""Weights that need no measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.errors import ConfigError
from cakeflow.forward.tokens import TextBatch
from cakeflow.models.language import LanguageModel
from cakeflow.weighters.base import Weighter


@dataclass(frozen=True)
class Uniform(Weighter):
    """Equal weights for all layers: MEMIT and AlphaEdit."""

    def weigh(self, lm: LanguageModel, batch: TextBatch, layers: Sequence[int]) -> Float[Tensor, " l"]:
        """Return 1 / l for every layer."""
        return torch.full((len(layers),), 1 / len(layers), dtype=torch.float64, device=lm.device)


@dataclass(frozen=True)
class OneHot(Weighter):
    """One layer only: ROME.

    Attributes:
        layer: Index of the block, which must be one of the candidates; None takes the middle one.
    """

    layer: int | None = None

    def check(self, layers: Sequence[int]) -> None:
        """Refuse a layer that is no candidate."""
        if self.layer is not None and self.layer not in layers:
            raise ConfigError(f"OneHot: layer {self.layer} is not among the layers {list(layers)}")

    def weigh(self, lm: LanguageModel, batch: TextBatch, layers: Sequence[int]) -> Float[Tensor, " l"]:
        """Return 1 for the layer and 0 for all others."""
        self.check(layers)
        return _indicator([layers[len(layers) // 2] if self.layer is None else self.layer], layers, lm)


@dataclass(frozen=True)
class Endpoints(Weighter):
    """The first and the last candidate: BLUE (boundary layers)."""

    def weigh(self, lm: LanguageModel, batch: TextBatch, layers: Sequence[int]) -> Float[Tensor, " l"]:
        """Return 1 for the first and the last layer and 0 for all others."""
        return _indicator([layers[0], layers[-1]], layers, lm)


def _indicator(chosen: Sequence[int], layers: Sequence[int], lm: LanguageModel) -> Float[Tensor, " l"]:
    return torch.tensor([float(layer in chosen) for layer in layers], dtype=torch.float64, device=lm.device)
