"""Keys and values of facts, read while hidden states climb the model once.

An edit at layer l changes nothing below l. So the hidden states that enter the layer in hand are kept and carried
upward: each layer costs two block evaluations on the prompts instead of a forward pass through the whole model, and
the keys seen in the walk are already those of the edited model (they depend only on the layers below, which are done).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.forward.packing import pad, plan
from cakeflow.forward.tokens import TextBatch
from cakeflow.models.architecture import Site
from cakeflow.models.hooks import capture, start_at
from cakeflow.models.language import LanguageModel


@dataclass
class _Chunk:
    """Some rows of a stream, and what enters block ``layer`` for them (nothing yet at layer 0)."""

    rows: list[int]
    ids: Tensor
    last: Tensor
    layer: int = 0
    hidden: Tensor | None = None


class PromptStream:
    """Prompts cut after the subject's last token, whose hidden states climb the model.

    Args:
        lm: The model.
        prompts: Token ids of each row, ending with the subject's last token (what follows cannot influence it).
        max_tokens: Most tokens in one forward pass.
    """

    def __init__(self, lm: LanguageModel, prompts: Sequence[Sequence[int]], max_tokens: int = 8192) -> None:
        self.lm = lm
        self.size = len(prompts)
        self.chunks = []
        for rows in plan([len(ids) for ids in prompts], max_tokens, slack=256):
            last = torch.tensor([len(prompts[i]) - 1 for i in rows], device=lm.device)
            self.chunks.append(_Chunk(rows, pad([prompts[i] for i in rows], lm.device), last))

    @torch.no_grad()
    def read(
        self, key_site: Site, value_site: Site | None = None
    ) -> tuple[Float[Tensor, "rows d_in"], Float[Tensor, "rows d_out"] | None]:
        """Climb to the layer of ``key_site`` and read there, under the weights as they are now.

        Args:
            key_site: The projection whose input is the key; its layer must not be below the last one read.
            value_site: Where to read a value as well, at or above that layer.

        Returns:
            Key and, where asked for, value of each row at its last token.
        """
        parts = [self._read(chunk, key_site, value_site) for chunk in self.chunks]
        order = torch.tensor([i for chunk in self.chunks for i in chunk.rows], device=self.lm.device).argsort()
        keys = torch.cat([key for key, _ in parts])[order]
        return keys, torch.cat([value for _, value in parts])[order] if value_site else None  # type: ignore[misc]

    @torch.no_grad()
    def mix(self, key_site: Site, weights: Float[Tensor, "n c"]) -> Float[Tensor, "n d_in"]:
        """Weighted sums of keys in float64, of n groups of c rows; no more than one pass's keys are held at once."""
        return reduce(torch.add, (self._mixed(chunk, key_site, weights) for chunk in self.chunks))

    def _mixed(self, chunk: _Chunk, key_site: Site, weights: Float[Tensor, "n c"]) -> Float[Tensor, "n d_in"]:
        """What the rows of one chunk add to the sums; as a product, because sums by index vary on GPUs."""
        keys, _ = self._read(chunk, key_site, None)
        group = torch.tensor(chunk.rows, device=weights.device)
        mixing = weights.new_zeros(len(weights), len(group))
        place = group // weights.shape[1], torch.arange(len(group), device=weights.device)
        mixing[place] = weights[place[0], group % weights.shape[1]]
        return mixing @ keys.double()

    def _read(self, chunk: _Chunk, key_site: Site, value_site: Site | None) -> tuple[Tensor, Tensor | None]:
        lm, rows = self.lm, torch.arange(len(chunk.rows), device=self.lm.device)
        below = [Site(key_site.layer - 1)] if key_site.layer > chunk.layer else []
        start = chunk.hidden if chunk.hidden is not None else torch.empty(0)
        with (
            start_at(lm, chunk.layer, start),
            capture(lm, below) as entering,
            capture(lm, [value_site] if value_site else []) as values,
            capture(lm, [key_site], side="in", stop=value_site is None) as keys,
            capture(lm, [Site(value_site.layer)] if value_site else [], stop=True),
        ):
            lm(input_ids=chunk.ids, attention_mask=torch.ones_like(chunk.ids), use_cache=False)
        if below:
            chunk.layer, chunk.hidden = key_site.layer, entering[below[0]]
        value = values[value_site][rows, chunk.last] if value_site else None
        return keys[key_site][rows, chunk.last], value


class FactReader:
    """Reads the mean key of each fact over its contexts, and its present value on the bare prompt.

    Args:
        lm: The model.
        batch: n facts.
        max_tokens: Most tokens in one forward pass.
    """

    def __init__(self, lm: LanguageModel, batch: TextBatch, max_tokens: int = 8192) -> None:
        prompts = [[row.ids[: row.subject + 1] for row in rows] for rows in batch.rows]
        self.weights = torch.tensor(batch.weights, dtype=torch.float64, device=lm.device)
        self.prompts = PromptStream(lm, [rows[0] for rows in prompts], max_tokens)
        others = [ids for rows in prompts for ids in rows[1:]]
        self.others = PromptStream(lm, others, max_tokens) if others else None

    def read(
        self, site: Site, value_site: Site
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]]:
        """Keys of a projection and values at the value site, in float64; sites must come in ascending order.

        Args:
            site: The projection to edit.
            value_site: Where target values are set.

        Returns:
            Mean key over the contexts (half of the weight on the bare prompt), key on the bare prompt, and the present
            output of the value site.
        """
        keys, values = self.prompts.read(site, value_site)
        keys = keys.double()
        mean = keys * self.weights[0]
        if self.others is not None:
            mean = mean + self.others.mix(site, self.weights[1:].expand(len(keys), -1))
        assert values is not None
        return mean, keys, values.double()

    def values(self, site: Site, value_site: Site) -> Float[Tensor, "n d_out"]:
        """Present values at the value site on the bare prompts, in float64; ``site`` is the last one that was read."""
        _, values = self.prompts.read(site, value_site)
        assert values is not None
        return values.double()
