"""Weights from layer scores: CAKE's softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.errors import ConfigError, require_choice, require_positive
from cakeflow.forward.tokens import TextBatch
from cakeflow.models.language import LanguageModel
from cakeflow.tracing import Attribution, CausalTrace, known_scores
from cakeflow.tracing.facts import predicted_rows
from cakeflow.weighters.base import Weighter

Normalization = Literal["none", "max", "minmax", "zscore"]
ScoreSource = Literal["global", "per_request"]


def score_weights(
    scores: Float[Tensor, "*n l"], tau: float = 0.1, normalization: Normalization = "none"
) -> Float[Tensor, "*n l"]:
    """Compute ``softmax(s / tau)`` (CAKE eq. 5), after an optional normalization of the scores.

    With the paper's own scores and tau = 0.1 these weights are within 4 % of uniform; check N_eff, which every run
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
    """Softmax of layer scores, given or measured.

    Attributes:
        scores: Layer -> score, or a list with one for each candidate layer in order; every candidate needs one. None
            measures them with ``attribution`` or, without one, takes the causal scores of the ``LocateThenEdit``, which
            a model's config brings along.
        tau: Temperature of the softmax.
        normalization: Normalization of the scores before the softmax.
        depth_power: alpha: scores are multiplied by (l / L)^alpha first, l counted from 1, L the model's depth (CAKE,
            section 3.2's boundary strategy). 0 leaves them as they are.
        score_source: ``global``, the mean over facts that the unedited model knows, as in the paper; or
            ``per_request``, on each request's own prompt, for the token that the model predicts there now.
        attribution: Measure of scores that are not given, before the first edit or per request; by default a
            ``CausalTrace``. A trace with ``noise=None`` takes its scale from the subjects of the facts at hand.
        max_bytes: Most bytes beyond the model that the measure may take; a run gives it its ``memory_budget``.
    """

    scores: dict[int, float] | list[float] | None = None
    tau: float = 0.1
    normalization: Normalization = "none"
    depth_power: float = 0.0
    score_source: ScoreSource = "global"
    attribution: Attribution | None = None
    max_bytes: float | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_positive("Scores", self, "tau")
        if not math.isfinite(self.depth_power):
            raise ConfigError(f"depth_power must be finite, got {self.depth_power}")
        require_choice("normalization", self.normalization, Normalization)
        require_choice("score_source", self.score_source, ScoreSource)

    def check(self, layers: Sequence[int]) -> None:
        """Refuse missing and infinite scores of the candidate layers."""
        if self.score_source == "per_request" or self.scores is None:
            return
        if isinstance(self.scores, list) and len(self.scores) != len(layers):
            raise ConfigError(
                f"Scores: {len(self.scores)} scores for {len(layers)} layers; give one for each, in order"
            )
        scores = self._by_layer(layers)
        if missing := [layer for layer in layers if layer not in scores]:
            raise ConfigError(
                f"Scores: no score for layers {missing}, only for {sorted(scores)}; give scores={{layer: score, ...}} "
                "for all of them, or none, to have them measured"
            )
        if bad := [layer for layer in layers if not math.isfinite(scores[layer])]:
            raise ConfigError(f"Scores: the score of layer {bad[0]} is {scores[bad[0]]}; give finite scores")

    def within(self, max_bytes: float | None) -> Scores:
        """Return the scores with a limit of memory for their measure."""
        return replace(self, max_bytes=max_bytes)

    def prepare(self, lm: LanguageModel, layers: Sequence[int]) -> Scores:
        """Measure global scores that were not given."""
        if self.score_source == "per_request" or self.scores is not None:
            return self
        measure = self.attribution or CausalTrace()
        complete = replace(self, scores=known_scores(lm, measure, layers, max_bytes=self.max_bytes))
        complete.check(layers)
        return complete

    def with_scores(self, scores: dict[int, float] | None) -> Scores:
        """Take a model's causal scores, unless the user named scores or an attribution."""
        return replace(self, scores=scores) if self.scores is None and self.attribution is None else self

    def weigh(self, lm: LanguageModel, batch: TextBatch, layers: Sequence[int]) -> Float[Tensor, "*n l"]:
        """Return the softmax of the layers' scores."""
        return self.weights(lm, self.score(lm, batch, layers), layers)

    def score(self, lm: LanguageModel, batch: TextBatch, layers: Sequence[int]) -> Float[Tensor, "*n l"]:
        """Return the layers' scores in float64, for all facts (l) or fact by fact (n x l)."""
        if self.score_source == "per_request":
            rows = predicted_rows(lm, batch, max_bytes=self.max_bytes)
            return (self.attribution or CausalTrace()).within(self.max_bytes).attribute(lm, rows, layers)
        complete = self.prepare(lm, layers)
        complete.check(layers)
        scores = complete._by_layer(layers)
        return torch.tensor([scores[layer] for layer in layers], dtype=torch.float64)

    def _by_layer(self, layers: Sequence[int]) -> dict[int, float]:
        """Return the given scores by layer."""
        return dict(zip(layers, self.scores, strict=True)) if isinstance(self.scores, list) else self.scores or {}

    def weights(self, lm: LanguageModel, scores: Float[Tensor, "*n l"], layers: Sequence[int]) -> Float[Tensor, "*n l"]:
        """Turn scores of the layers into weights: depth factor, normalization, softmax."""
        depth = torch.tensor([(layer + 1) / lm.depth for layer in layers], dtype=torch.float64)
        return score_weights(scores * depth**self.depth_power, self.tau, self.normalization).to(lm.device)
