"""The three kinds of runs of a causal trace, for a group of facts at once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Float, Int
from torch import Tensor

from cakeflow.errors import NumericalError
from cakeflow.forward.packing import pad
from cakeflow.forward.suffix import Recording, Suffixes, first_changed, take
from cakeflow.forward.tokens import Row
from cakeflow.models.architecture import Site
from cakeflow.models.hooks import capture, logits_at, patch
from cakeflow.models.language import LanguageModel


@dataclass(frozen=True, eq=False)
class TraceRuns:
    """Clean and corrupted runs of n facts, the starting points of runs with a restored state.

    Attributes:
        lm: The model.
        rows: The facts.
        spans: For each of l layers the sites that are restored together, in ascending order.
        clean: Probability of each object in the clean run.
        outputs: Outputs of the sites in the clean run.
        noisy: The corrupted runs, ordered by fact, then by draw.
    """

    lm: LanguageModel
    rows: Sequence[Row]
    spans: Sequence[Sequence[Site]]
    clean: Float[Tensor, " n"]
    outputs: dict[Site, Float[Tensor, "n time width"]]
    noisy: Recording

    @classmethod
    def of(
        cls,
        lm: LanguageModel,
        rows: Sequence[Row],
        spans: Sequence[Sequence[Site]],
        noise: Float[Tensor, "n draws time width"],
    ) -> TraceRuns:
        """Compute the clean and the corrupted runs; the noise is added to the embeddings."""
        ids = pad([row.ids[: row.target] for row in rows], lm.device)
        sites = sorted({site for span in spans for site in span}, key=lambda site: site.layer)
        every, last = (
            torch.tensor(each, device=ids.device) for each in (range(len(rows)), [r.target - 1 for r in rows])
        )
        with capture(lm, sites) as outputs, logits_at(lm, every, last):
            logits = lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
        clean = _chance(logits, _answers(rows, ids.device))
        embeds = lm.model.get_input_embeddings()(ids)
        noisy = rearrange(embeds[:, None] + noise.to(embeds), "n draws time width -> (n draws) time width")
        below = [_entering(first_changed(span[0])) for span in spans] + [_entering(lm.depth)]
        return cls(lm, rows, spans, clean, outputs, Recording.of(lm, noisy, [*dict.fromkeys(below)]))

    @property
    def draws(self) -> int:
        """Number of corrupted runs of each fact."""
        return len(self.noisy.tokens) // len(self.rows)

    def corrupted(self) -> Float[Tensor, " n"]:
        """Return the probability of each object in the corrupted runs, mean over the draws."""
        suffixes = self._from([row.target - 1 for row in self.rows], self.lm.depth)
        return self._mean_chance(suffixes.run(self.lm), suffixes.label)[0]

    def restored(self, at: Sequence[int]) -> Float[Tensor, "n l"]:
        """Return the probability of each object with each span's clean output restored at one token.

        The runs climb together: each joins at the first block that its span changes, so that a block runs once for all
        active runs, with large matrix products.

        Args:
            at: The token of each fact; one past a fact's end stands for its last.
        """
        at = [min(token, row.target - 1) for token, row in zip(at, self.rows, strict=True)]
        order = sorted(range(len(self.spans)), key=lambda index: first_changed(self.spans[index][0]))
        spans = [self.spans[index] for index in order]
        firsts = [first_changed(span[0]) for span in spans]
        starts, suffixes = sorted({*firsts}), self._from(at, firsts[0])
        hidden = suffixes.hidden[:0]
        for first, following in zip(starts, [*starts[1:], None], strict=True):
            active = spans[: bisect_right(firsts, first)]
            entering = take(self.noisy.outputs[_entering(first)], suffixes.positions)
            hidden = torch.cat([hidden, *[entering] * firsts.count(first)])
            running = replace(suffixes.copies(len(active)), first=first, hidden=hidden)
            # from the block below on: the output of a ``block`` site is restored before its next block runs
            layers = range(first - 1, following or self.lm.depth)
            changes = self._restorations(at, suffixes.changed_column, active, layers)
            if following is not None:
                hidden = running.output(self.lm, Site(following - 1), *changes)
        chances = torch.empty(len(spans), len(at), dtype=torch.float64)
        chances[order] = self._mean_chance(running.run(self.lm, *changes), running.label)
        return chances.T

    def _restorations(
        self, at: Sequence[int], columns: Int[Tensor, " runs"], spans: Sequence[Sequence[Site]], layers: range
    ) -> list[AbstractContextManager[None]]:
        """Build the patches that restore clean outputs in copies of the runs, one copy per span, in some layers."""
        count, facts = len(self.noisy.tokens), range(len(at))
        every = torch.arange(count, device=self.noisy.tokens.device)
        changes = []
        for site, output in self.outputs.items():
            copies = [copy for copy, span in enumerate(spans) if site.layer in layers and site in span]
            if copies:
                rows = torch.cat([copy * count + every for copy in copies])
                value = repeat(output[facts, at], "n width -> (c n draws) width", c=len(copies), draws=self.draws)
                places = repeat(columns, "runs -> (c runs)", c=len(copies))
                changes.append(patch(self.lm, site, value, rows, places))
        return changes

    def _from(self, at: Sequence[int], first: int) -> Suffixes:
        """Cut the corrupted runs at each fact's token; the object's logits are read at their ends."""
        device = self.noisy.tokens.device
        start = repeat(torch.tensor(at, device=device), "n -> (n draws)", draws=self.draws)
        ends = [row.target - 1 - token for row, token in zip(self.rows, at, strict=True)]
        answers = _answers(self.rows, device).tolist()
        reads = [
            (fact * self.draws + draw, ends[fact], answers[fact])
            for fact in range(len(ends))
            for draw in range(self.draws)
        ]
        return self.noisy.cut(first, start, max(ends) + 1, torch.arange(len(start), device=device), reads)

    def _mean_chance(
        self, logits: Float[Tensor, "read vocabulary"], label: Int[Tensor, " read"]
    ) -> Float[Tensor, "copies n"]:
        """Return the probability of each object, mean over the draws, one row per copy of the runs."""
        chances = _chance(logits, label)
        return reduce(chances, "(copies n draws) -> copies n", "mean", n=len(self.rows), draws=self.draws)


def _entering(first: int) -> Site:
    """Return the site whose output enters block ``first``; block 0, which has none, runs on the embeddings."""
    return Site(max(first - 1, 0))


def _answers(rows: Sequence[Row], device: torch.device) -> Int[Tensor, " n"]:
    return torch.tensor([row.ids[row.target] for row in rows], device=device)


def _chance(logits: Float[Tensor, "n vocabulary"], label: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chance: Tensor = torch.softmax(precise, -1).gather(1, label[:, None])[:, 0].double().cpu()
    if not bool(torch.isfinite(chance).all()):
        raise NumericalError("a probability of the trace is not finite; load the model in float32")
    return chance
