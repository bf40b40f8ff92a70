"""Weights that need no measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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
        layer: Index of the block, which must be one of the candidates, or the ``first`` or ``last`` of them; None takes
            the middle one.
    """

    layer: int | Literal["first", "last"] | None = None

    def check(self, layers: Sequence[int]) -> None:
        """Refuse a layer that is no candidate."""
        if self._chosen(layers) not in layers:
            raise ConfigError(f"OneHot: layer {self.layer!r} is not among the layers {list(layers)}")

    def weigh(self, lm: LanguageModel, batch: TextBatch, layers: Sequence[int]) -> Float[Tensor, " l"]:
        """Return 1 for the layer and 0 for all others."""
        self.check(layers)
        return _indicator([self._chosen(layers)], layers, lm)

    def _chosen(self, layers: Sequence[int]) -> int | str:
        names = {None: layers[len(layers) // 2], "first": layers[0], "last": layers[-1]}
        return self.layer if isinstance(self.layer, int) else names.get(self.layer, str(self.layer))


@dataclass(frozen=True)
class Endpoints(Weighter):
    """The first and the last candidate: BLUE (boundary layers)."""

    def weigh(self, lm: LanguageModel, batch: TextBatch, layers: Sequence[int]) -> Float[Tensor, " l"]:
        """Return 1 for the first and the last layer and 0 for all others."""
        return _indicator([layers[0], layers[-1]], layers, lm)


def _indicator(chosen: Sequence[object], layers: Sequence[int], lm: LanguageModel) -> Float[Tensor, " l"]:
    return torch.tensor([float(layer in chosen) for layer in layers], dtype=torch.float64, device=lm.device)
