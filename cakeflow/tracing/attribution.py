"""The slot for what scores layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from cakeflow.forward.tokens import Row
from cakeflow.models.language import LanguageModel


class Attribution(ABC):
    """Says how much each layer has to do with what a model says at the end of a prompt.

    Contract: pure (the same facts get the same scores, whichever others are asked with them, up to settings that are
    taken from all of them), and the model is left bit-identical. Subclasses are frozen dataclasses.
    """

    @abstractmethod
    def attribute(self, lm: LanguageModel, rows: Sequence[Row], layers: Sequence[int]) -> Float[Tensor, "n l"]:
        """Score layers, fact by fact.

        Args:
            lm: The model.
            rows: n facts as tokens: the subject marked, the token to be explained at ``target``.
            layers: l layers.
        """
