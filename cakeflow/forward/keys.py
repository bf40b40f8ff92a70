"""Keys and values of facts, read in one climb through the model.

An edit at layer l changes nothing below l. So the hidden states that enter the current layer are stored and carried
upward: each layer costs two block evaluations on the prompts instead of a forward pass through the whole model. The
keys are already those of the edited model, because they depend only on the layers below, which are edited before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cakeflow.forward.packing import pad, plan
from cakeflow.forward.tokens import TextBatch
from cakeflow.models.architecture import Site
from cakeflow.models.hooks import calls, capture, inject, patch, start_at
from cakeflow.models.language import LanguageModel
from cakeflow.ranks import spread


@dataclass
class _Chunk:
    """Some rows of a stream, and the hidden states that enter block ``layer`` for them (None at layer 0)."""

    rows: list[int]
    ids: Tensor
    last: Tensor
    layer: int = 0
    hidden: Tensor | None = None


class PromptStream:
    """Prompts cut after the token at which the fact is written, run through the model layer by layer.

    Args:
        lm: The model.
        prompts: Token ids of each row, up to the token that is read, which later tokens cannot influence.
        max_tokens: Most tokens in one forward pass.
    """

    def __init__(self, lm: LanguageModel, prompts: Sequence[Sequence[int]], max_tokens: int = 8192) -> None:
        self.lm = lm
        self.size = len(prompts)
        self.chunks = []
        for rows in plan([len(ids) for ids in prompts], max_tokens, slack=256):
            last = torch.tensor([len(prompts[i]) - 1 for i in rows], device=lm.device)
            self.chunks.append(_Chunk(rows, pad([prompts[i] for i in rows], lm.device), last))
        self._order = torch.tensor([i for chunk in self.chunks for i in chunk.rows], device=lm.device).argsort()

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
        keys = torch.cat([key for key, _ in parts])[self._order]
        return keys, torch.cat([value for _, value in parts])[self._order] if value_site else None  # type: ignore[misc]

    @torch.no_grad()
    def mix(
        self, key_site: Site, owners: Int[Tensor, " rows"], weights: Float[Tensor, " rows"], count: int
    ) -> Float[Tensor, "n d_in"]:
        """Return weighted sums of keys, in float64, with the keys of one pass in memory.

        Args:
            key_site: Projection whose input is the key.
            owners: For each row the sum that it belongs to.
            weights: Weight of each row in its sum.
            count: Number n of sums.
        """
        return reduce(torch.add, (self._mix_chunk(chunk, key_site, owners, weights, count) for chunk in self.chunks))

    def _mix_chunk(self, chunk: _Chunk, key_site: Site, owners: Tensor, weights: Tensor, count: int) -> Tensor:
        """Return the part of the sums from one chunk."""
        keys, _ = self._read(chunk, key_site, None)
        mixing = weights.new_zeros(count, len(chunk.rows))
        mixing[owners[chunk.rows], torch.arange(len(chunk.rows), device=weights.device)] = weights[chunk.rows]
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
        parts = [self._probe(chunk, site, delta[chunk.rows], inputs, outputs) for chunk in self.chunks]
        entering, leaving = zip(*parts, strict=True)
        return (
            {each: torch.cat([part[each] for part in entering])[self._order] for each in inputs},
            {each: torch.cat([part[each] for part in leaving])[self._order] for each in outputs},
        )

    @torch.no_grad()
    def carry(
        self, site: Site, value: Float[Tensor, "rows d_out"] | None, outputs: Sequence[Site]
    ) -> dict[Site, Float[Tensor, "rows d_out"]]:
        """Run the prompts once with a module's output replaced at every row's last token, and read outputs there.

        Args:
            site: Module whose output is replaced.
            value: Its new output for each row; None leaves it as it is.
            outputs: Modules whose outputs to read, in ascending order.

        Returns:
            Outputs at each row's last token, in float64.
        """
        parts = [
            self._carry(chunk, site, None if value is None else value[chunk.rows], outputs) for chunk in self.chunks
        ]
        return {each: torch.cat([part[each] for part in parts])[self._order] for each in outputs}

    def _carry(self, chunk: _Chunk, site: Site, value: Tensor | None, outputs: Sequence[Site]) -> dict[Site, Tensor]:
        rows = torch.arange(len(chunk.rows), device=self.lm.device)
        put = nullcontext() if value is None else patch(self.lm, site, value, rows, chunk.last)
        with put, capture(self.lm, outputs, stop=True) as values:
            self.lm(input_ids=chunk.ids, attention_mask=torch.ones_like(chunk.ids), use_cache=False)
        return {each: value[rows, chunk.last].double() for each, value in values.items()}

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


@dataclass(frozen=True, eq=False)
class _Others:
    """The contexts of some facts but for their first ones; the rank that reads them climbs them on.

    Attributes:
        stream: Their rows.
        owners: For each row the place of its fact among these.
        weights: Weight of each row.
        count: Number n of facts.
    """

    stream: PromptStream
    owners: Int[Tensor, " rows"]
    weights: Float[Tensor, " rows"]
    count: int

    @classmethod
    def of(cls, lm: LanguageModel, batch: TextBatch, facts: Sequence[int], max_tokens: int) -> _Others:
        """Collect the rows of the facts at some places of a batch."""
        rows = [row.ids[: row.fact + 1] for i in facts for row in batch.rows[i][1:]]
        owners = [place for place, i in enumerate(facts) for _ in batch.rows[i][1:]]
        weights = _column(lm, (each for i in facts for each in batch.weights[i][1:]))
        stream = PromptStream(lm, rows, max_tokens)
        return cls(stream, torch.tensor(owners, dtype=torch.long, device=lm.device), weights, len(facts))

    def mean(self, site: Site) -> Float[Tensor, "n d_in"]:
        """Return the part of the facts' mean keys that these contexts have."""
        if not self.stream.size:
            return self.weights.new_zeros(self.count, self.stream.lm.key_width(site))
        return self.stream.mix(site, self.owners, self.weights, self.count)


def _column(lm: LanguageModel, values: Iterable[float]) -> Float[Tensor, " rows"]:
    return torch.tensor(list(values), dtype=torch.float64, device=lm.device)


class FactReader:
    """Reader of the mean key of each fact over its contexts, and of its present value in the first of them.

    Args:
        lm: The model.
        batch: n facts.
        max_tokens: Most tokens in one forward pass.
        tile: Most facts whose further contexts are read together, by one rank; all of them by default.
    """

    def __init__(self, lm: LanguageModel, batch: TextBatch, max_tokens: int = 8192, tile: int | None = None) -> None:
        self.prompts = PromptStream(lm, [rows[0].ids[: rows[0].fact + 1] for rows in batch.rows], max_tokens)
        self.weights = _column(lm, (weights[0] for weights in batch.weights))
        size = tile or max(1, len(batch))
        tiles = [range(start, min(start + size, len(batch))) for start in range(0, len(batch), size)]
        bare = all(len(rows) == 1 for rows in batch.rows)
        self.others = [] if bare else [_Others.of(lm, batch, facts, max_tokens) for facts in tiles]

    def read(
        self, site: Site, value_site: Site
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]]:
        """Return keys of a projection and values at the value site, in float64; call in ascending order of sites.

        Args:
            site: Projection to edit.
            value_site: Module whose output gets the target values.

        Returns:
            Mean key over the contexts (weighted by the batch), key in the first of them, which is the bare prompt if it
            is among them, and the present output of the value site there.
        """
        keys, values = self.prompts.read(site, value_site)
        assert values is not None
        return self._mean(site, keys.double()), keys.double(), values.double()

    def keys(self, site: Site) -> Float[Tensor, "n d_in"]:
        """Return the mean keys alone; call in ascending order of sites."""
        return self._mean(site, self.prompts.read(site)[0].double())

    def _mean(self, site: Site, keys: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """Return the mean keys over the contexts; ``keys`` are those in the first one."""
        mean = keys * self.weights[:, None]
        if self.others:
            mean = mean + torch.cat(spread(self.others, lambda each: each.mean(site))).to(mean.device)
        return mean

    def values(self, site: Site, value_site: Site) -> Float[Tensor, "n d_out"]:
        """Return present values at the value site in the first contexts, in float64; ``site`` is the last one read."""
        _, values = self.prompts.read(site, value_site)
        assert values is not None
        return values.double()


def read_keys(
    lm: LanguageModel, batch: TextBatch, sites: Sequence[Site], max_tokens: int = 8192
) -> dict[Site, Float[Tensor, "n d_in"]]:
    """Read the keys of facts at some projections, in one climb through the model as it is now.

    These are the keys that a solve would get there, before the batch changes anything below.

    Args:
        lm: The model.
        batch: n facts.
        sites: Projections whose inputs are the keys.
        max_tokens: Most tokens in one forward pass.

    Returns:
        Site -> key of each fact, the mean over its contexts, in float64; in ascending order of layers.

    Example:
        >>> from cakeflow.models import Site
        >>> from cakeflow.testing import tiny_batch, tiny_model
        >>> lm = tiny_model()
        >>> keys = read_keys(lm, tiny_batch(lm), [Site(0, "mlp_out"), Site(2, "mlp_out")])
        >>> {site.layer: tuple(each.shape) for site, each in keys.items()}
        {0: (3, 64), 2: (3, 64)}
    """
    reader = FactReader(lm, batch, max_tokens)
    return {site: reader.keys(site) for site in sorted(sites, key=lambda site: site.layer)}
