"""Choices of a user for an export: how numbers are stored, and what the export is to fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cakeflow.errors import ConfigError, require_choice
from cakeflow.models.loading import HUB_IDS

OverRank = Literal["error", "truncate", "split"]
"""What becomes of an adapter of too large a rank."""
DeltaLayout = Literal["smallest", "dense"]
"""How a delta holds the weights."""
SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM accepts as ``max_lora_rank``."""


@dataclass(frozen=True)
class ExportOptions:
    """Choices of an export; each belongs to some formats and is refused by none.

    Attributes:
        tensor_type: Type of the edited tensors in a GGUF file: ``exact`` (the one of the model's weights), ``same``
            (that of the original file), or a name that the ``gguf`` package can quantize to, such as ``Q8_0``.
        source: The GGUF file that the model was loaded from, if the model's name does not say it.
        max_rank: Largest rank of an adapter that the server takes; None for vLLM's largest, 512.
        over_rank: What becomes of an adapter of a larger rank: ``error``; ``truncate``, to the largest singular values,
            with the error in the manifest; ``split``, into adapters of at most that rank whose sum is the change.
        layout: How a delta holds each weight: ``smallest``, as factors, as the entries that differ or whole, whichever
            takes the fewest bytes; ``dense``, whole, for other programs. Both give equal bits.
        base: Hub id or folder of the base model, as cards and adapters name it.
    """

    tensor_type: str = "exact"
    source: str = ""
    max_rank: int | None = None
    over_rank: OverRank = "error"
    layout: DeltaLayout = "smallest"
    base: str = ""

    def base_of(self, model: str) -> str:
        """Return the name by which others find a base model of this name."""
        return self.base or HUB_IDS.get(model, model)

    def __post_init__(self) -> None:
        if self.max_rank is not None and self.max_rank not in SERVED_RANKS:
            raise ConfigError(f"max_rank = {self.max_rank}: vLLM accepts {', '.join(map(str, SERVED_RANKS))}")
        require_choice("over_rank", self.over_rank, OverRank)
        require_choice("layout", self.layout, DeltaLayout)
