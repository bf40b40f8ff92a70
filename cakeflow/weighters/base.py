"""The weighter slot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from cakeflow.forward.tokens import TextBatch
from cakeflow.models.language import LanguageModel


class Weighter(ABC):
    """Importance of each candidate layer, for all facts at once or per fact.

    Contract: weights are finite and not negative, at least one is positive, and the model is left bit-identical.

    What may be measured of the model is public in ``cakeflow.forward``: ``read_keys`` gives a batch's keys.

    Example:
        >>> from dataclasses import dataclass
        >>> import torch
        >>> from cakeflow.forward import read_keys
        >>> from cakeflow.models import Site
        >>> from cakeflow.testing import tiny_batch, tiny_model
        >>> @dataclass(frozen=True)
        ... class KeyNorms(Weighter):
        ...     def weigh(self, lm, batch, layers):
        ...         keys = read_keys(lm, batch, [Site(layer, "mlp_out") for layer in layers])
        ...         return torch.stack([each.norm(dim=1) for each in keys.values()], dim=1)
        >>> lm = tiny_model()
        >>> KeyNorms().weigh(lm, tiny_batch(lm), [0, 1, 2]).shape
        torch.Size([3, 3])
    """

    def check(self, layers: Sequence[int]) -> None:  # noqa: B027 - most weighters fit any layers
        """Refuse settings that do not fit the candidate layers; called before anything expensive.

        Raises:
            ConfigError: If a setting does not fit.
        """

    def within(self, max_bytes: float | None) -> Weighter:
        """Return the weighter with a limit for its measurements, in bytes beyond the model."""
        return self

    def prepare(self, lm: LanguageModel, layers: Sequence[int]) -> Weighter:
        """Return the weighter with its measurements of the unedited model; called once, before the first edit."""
        return self

    def with_scores(self, scores: dict[int, float] | None) -> Weighter:
        """Return the weighter with the causal scores of a model (layer -> score), if it needs scores and has none."""
        return self

    @abstractmethod
    def weigh(self, lm: LanguageModel, batch: TextBatch, layers: Sequence[int]) -> Float[Tensor, "*n l"]:
        """Weigh the layers.

        Args:
            lm: The model.
            batch: n facts.
            layers: The l candidate layers, ascending.

        Returns:
            Weights in float64, one per layer (l) or per fact and layer (n x l).
        """


def effective_layers(weights: Float[Tensor, "*n l"]) -> Float[Tensor, "*n"]:
    """Compute ``N_eff = 1 / ||w||^2`` of normalised weights: the effective number of layers (CAKE, Theorem 3).

    Example:
        >>> import torch
        >>> round(float(effective_layers(torch.ones(5, dtype=torch.float64))), 6)
        5.0
    """
    normalised = weights / weights.sum(-1, keepdim=True)
    return 1 / normalised.square().sum(-1)
