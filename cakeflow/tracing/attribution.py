"""The attribution slot: measures of layer scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from cakeflow.forward.tokens import Row
from cakeflow.models.language import LanguageModel


class Attribution(ABC):
    """A measure of each layer's contribution to a model's prediction at the end of a prompt.

    Contract: pure (a fact's scores do not depend on the other facts of the call, except through settings derived from
    all of them), and the model stays bit-identical. Subclasses are frozen dataclasses.
    """

    def within(self, max_bytes: float | None) -> Attribution:
        """Return the measure with a limit of memory, in bytes beyond the model; itself if it has no such choice."""
        return self

    @abstractmethod
    def attribute(self, lm: LanguageModel, rows: Sequence[Row], layers: Sequence[int]) -> Float[Tensor, "n l"]:
        """Score layers, fact by fact.

        Args:
            lm: The model.
            rows: n facts as tokens: the subject marked, the token to explain at ``target``.
            layers: l layers.
        """
