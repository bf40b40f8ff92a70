"""Keys and values of facts, read in one climb through the model.

An edit at layer l changes nothing below l. So the hidden states that enter the current layer are stored and carried
upward: each layer costs two block evaluations on the prompts instead of a forward pass through the whole model. The
keys are already those of the edited model, because they depend only on the layers below, which are edited before.
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
from cakeflow.models.hooks import calls, capture, inject, start_at
from cakeflow.models.language import LanguageModel


@dataclass
class _Chunk:
    """Some rows of a stream, and the hidden states that enter block ``layer`` for them (None at layer 0)."""

    rows: list[int]
    ids: Tensor
    last: Tensor
    layer: int = 0
    hidden: Tensor | None = None


class PromptStream:
    """Prompts cut after the subject's last token, run through the model layer by layer.

    Args:
        lm: The model.
        prompts: Token ids of each row, up to the subject's last token, which later tokens cannot influence.
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
        """Run the prompts up to ``key_site`` and read keys, under the present weights.

        Args:
            key_site: Projection whose input is the key; its layer must not be below that of the previous call.
            value_site: Module whose output is the value, at or above that layer; None reads no values.

        Returns:
            Key and, with a value site, value of each row at its last token.
        """
        parts = [self._read(chunk, key_site, value_site) for chunk in self.chunks]
        order = torch.tensor([i for chunk in self.chunks for i in chunk.rows], device=self.lm.device).argsort()
        keys = torch.cat([key for key, _ in parts])[order]
        return keys, torch.cat([value for _, value in parts])[order] if value_site else None  # type: ignore[misc]

    @torch.no_grad()
    def mix(self, key_site: Site, weights: Float[Tensor, "n c"]) -> Float[Tensor, "n d_in"]:
        """Return weighted sums of the keys of n groups of c rows, in float64, with the keys of one pass in memory."""
        return reduce(torch.add, (self._mix_chunk(chunk, key_site, weights) for chunk in self.chunks))

    def _mix_chunk(self, chunk: _Chunk, key_site: Site, weights: Float[Tensor, "n c"]) -> Float[Tensor, "n d_in"]:
        """Return the part of the sums from one chunk."""
        keys, _ = self._read(chunk, key_site, None)
        group = torch.tensor(chunk.rows, device=weights.device)
        mixing = weights.new_zeros(len(weights), len(group))
        place = group // weights.shape[1], torch.arange(len(group), device=weights.device)
        mixing[place] = weights[place[0], group % weights.shape[1]]
        return mixing @ keys.double()  # not index_add_, whose order of additions varies on GPUs

    @torch.no_grad()
    def probe(
        self, site: Site, delta: Float[Tensor, "rows d_out"], inputs: Sequence[Site], outputs: Sequence[Site]
    ) -> tuple[dict[Site, Float[Tensor, "rows d"]], dict[Site, Float[Tensor, "rows d"]]]:
        """Run one block again with a vector added to a projection's output at every row's last token.

        Args:
            site: Projection; its layer is that of the last read.
            delta: Vector for each row.
            inputs: Modules of the block whose inputs to read.
            outputs: Modules of the block whose outputs to read.

        Returns:
            Inputs and outputs at each row's last token, in float64.
        """
        order = torch.tensor([i for chunk in self.chunks for i in chunk.rows], device=self.lm.device).argsort()
        parts = [self._probe(chunk, site, delta[chunk.rows], inputs, outputs) for chunk in self.chunks]
        entering, leaving = zip(*parts, strict=True)
        return (
            {each: torch.cat([part[each] for part in entering])[order] for each in inputs},
            {each: torch.cat([part[each] for part in leaving])[order] for each in outputs},
        )

    @torch.no_grad()
    def calls(self, layer: int) -> list[str]:
        """List the modules of the block of the last read in the order in which they return, as paths below it."""
        with calls(self.lm, layer) as order:
            self._rerun(self.chunks[0], layer)
        return order

    def _probe(
        self, chunk: _Chunk, site: Site, delta: Tensor, inputs: Sequence[Site], outputs: Sequence[Site]
    ) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
        rows = torch.arange(len(chunk.rows), device=self.lm.device)
        with (
            inject(self.lm, site, delta, chunk.last),
            capture(self.lm, inputs, side="in") as entering,
            capture(self.lm, outputs) as leaving,
        ):
            self._rerun(chunk, site.layer)
        return tuple(  # type: ignore[return-value]
            {each: value[rows, chunk.last].double() for each, value in values.items()} for values in (entering, leaving)
        )

    def _rerun(self, chunk: _Chunk, layer: int) -> None:
        """Run the model from the stored hidden states to the end of a block."""
        start = chunk.hidden if chunk.hidden is not None else torch.empty(0)
        with start_at(self.lm, chunk.layer, start), capture(self.lm, [Site(layer)], stop=True):
            self.lm(input_ids=chunk.ids, attention_mask=torch.ones_like(chunk.ids), use_cache=False)

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
    """Reader of the mean key of each fact over its contexts, and of its present value on the bare prompt.

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
        """Return keys of a projection and values at the value site, in float64; call in ascending order of sites.

        Args:
            site: Projection to edit.
            value_site: Module whose output gets the target values.

        Returns:
            Mean key over the contexts (weighted by the batch), key on the bare prompt, and present output of the value
            site.
        """
        keys, values = self.prompts.read(site, value_site)
        keys = keys.double()
        mean = keys * self.weights[0]
        if self.others is not None:
            mean = mean + self.others.mix(site, self.weights[1:].expand(len(keys), -1))
        assert values is not None
        return mean, keys, values.double()

    def values(self, site: Site, value_site: Site) -> Float[Tensor, "n d_out"]:
        """Return present values at the value site on the bare prompts, in float64; ``site`` is the last one read."""
        _, values = self.prompts.read(site, value_site)
        assert values is not None
        return values.double()
