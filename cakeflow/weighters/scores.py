"""Weights from given scores: CAKE's softmax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.batch import EditBatch
from cakeflow.errors import ConfigError
from cakeflow.model import LanguageModel
from cakeflow.weighters.base import Weighter

Normalization = Literal["none", "max", "minmax", "zscore"]


def score_weights(
    scores: Float[Tensor, "*n l"], tau: float = 0.1, normalization: Normalization = "none"
) -> Float[Tensor, "*n l"]:
    """``softmax(s / tau)`` (CAKE eq. 5), after an optional normalisation of the scores.

    With the paper's own scores and tau = 0.1 these weights are within 4 % of uniform; look at N_eff, which every run
    logs, before crediting the allocation with a gain.

    Args:
        scores: One score per layer.
        tau: Temperature; infinity gives exactly uniform weights, tau -> 0 the best layer alone.
        normalization: ``none``, ``max`` (s / max s), ``minmax`` (to [0, 1]) or ``zscore``.

    Example:
        >>> import torch
        >>> [round(w, 4) for w in score_weights(torch.tensor([0.088, 0.090, 0.092, 0.094, 0.095])).tolist()]
        [0.1925, 0.1964, 0.2003, 0.2044, 0.2064]
    """
    if normalization == "max":
        scores = scores / scores.amax(-1, keepdim=True)
    elif normalization == "minmax":
        low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
        scores = (scores - low) / (high - low).clamp_min(torch.finfo(scores.dtype).tiny)
    elif normalization == "zscore":
        spread = scores.std(-1, keepdim=True, correction=0)
        scores = (scores - scores.mean(-1, keepdim=True)) / spread.clamp_min(torch.finfo(scores.dtype).tiny)
    return (scores / tau).softmax(-1)


@dataclass(frozen=True)
class Scores(Weighter):
    """Softmax of scores that are known already, for instance from a causal trace of the same model.

    Attributes:
        scores: Layer -> score; every candidate layer needs one. None takes the ``scores`` of the ``EditModule``, which
            a model's config brings along.
        tau: Temperature of the softmax.
        normalization: Of the scores, before the softmax.
    """

    scores: dict[int, float] | None = None
    tau: float = 0.1
    normalization: Normalization = "none"

    def __post_init__(self) -> None:
        if not self.tau > 0:
            raise ConfigError(f"tau must be above 0, got {self.tau}")
        if self.normalization not in get_args(Normalization):
            raise ConfigError(f"normalization must be one of {get_args(Normalization)}, got {self.normalization!r}")

    def check(self, layers: Sequence[int]) -> None:
        """See ``Weighter.check``."""
        scores = self.scores or {}
        if missing := [layer for layer in layers if layer not in scores]:
            raise ConfigError(
                f"Scores: no score for layers {missing}, only for {sorted(scores)}; give scores={{layer: score, ...}}"
            )

    def weigh(self, lm: LanguageModel, batch: EditBatch, layers: Sequence[int]) -> Float[Tensor, " l"]:
        """See ``Weighter.weigh``."""
        self.check(layers)
        scores = self.scores or {}
        values = torch.tensor([scores[layer] for layer in layers], dtype=torch.float64, device=lm.device)
        return score_weights(values, self.tau, self.normalization)
