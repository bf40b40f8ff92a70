"""The three kinds of runs of a causal trace, for a group of facts at once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cakeflow.errors import NumericalError
from cakeflow.forward.packing import pad
from cakeflow.forward.suffix import Recording, Suffixes, first_changed, take
from cakeflow.forward.tokens import Row
from cakeflow.models.architecture import Site
from cakeflow.models.hooks import capture, patch
from cakeflow.models.language import LanguageModel


@dataclass(frozen=True, eq=False)
class TraceRuns:
    """Clean and corrupted runs of n facts, from which runs with a restored state go on.

    Attributes:
        lm: The model.
        rows: The facts.
        spans: For each of l layers the sites that are restored together, in ascending order.
        clean: Probability of each object in the clean run.
        outputs: What the sites gave in the clean run.
        noisy: The corrupted runs, those of one fact together.
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
        """Do the clean and the corrupted runs; the noise is added to the embeddings."""
        ids = pad([row.ids[: row.target] for row in rows], lm.device)
        sites = sorted({site for span in spans for site in span}, key=lambda site: site.layer)
        with capture(lm, sites) as outputs:
            logits = lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        clean = _chance(logits[range(len(rows)), [row.target - 1 for row in rows]], _answers(rows, ids.device))
        embeds = lm.model.get_input_embeddings()(ids)
        noisy = (embeds[:, None] + noise.to(embeds)).flatten(0, 1)
        below = [_entering(first_changed(span[0])) for span in spans] + [_entering(lm.depth)]
        return cls(lm, rows, spans, clean, outputs, Recording.of(lm, noisy, [*dict.fromkeys(below)]))

    @property
    def draws(self) -> int:
        """Corrupted runs of each fact."""
        return len(self.noisy.tokens) // len(self.rows)

    def corrupted(self) -> Float[Tensor, " n"]:
        """Probability of each object in the corrupted runs, mean over the draws."""
        suffixes = self._from([row.target - 1 for row in self.rows], self.lm.depth)
        return self._mean_chance(suffixes.run(self.lm), suffixes.label)[0]

    def restored(self, at: Sequence[int]) -> Float[Tensor, "n l"]:
        """Probability of each object with each span's clean output put back at one token.

        The runs climb together: each joins at the first block that its span changes, so a block runs once for all that
        have begun, and its matrix products are large.

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
            begun = spans[: bisect_right(firsts, first)]
            entering = take(self.noisy.outputs[_entering(first)], suffixes.positions)
            hidden = torch.cat([hidden, *[entering] * firsts.count(first)])
            running = replace(suffixes.copies(len(begun)), first=first, hidden=hidden)
            changes = self._restorations(
                at, suffixes.changed_column, begun, range(first - 1, following or self.lm.depth)
            )
            if following is not None:
                hidden = running.output(self.lm, Site(following - 1), *changes)
        found = torch.empty(len(spans), len(at), dtype=torch.float64)
        found[order] = self._mean_chance(running.run(self.lm, *changes), running.label)
        return found.T

    def _restorations(
        self, at: Sequence[int], origin: Int[Tensor, " runs"], begun: Sequence[Sequence[Site]], layers: range
    ) -> list[AbstractContextManager[None]]:
        """What puts clean outputs back into copies of the runs, one copy per span, in some layers."""
        count, facts = len(self.noisy.tokens), range(len(at))
        every = torch.arange(count, device=self.noisy.tokens.device)
        changes = []
        for site, output in self.outputs.items():
            copies = [copy for copy, span in enumerate(begun) if site.layer in layers and site in span]
            if copies:
                rows = torch.cat([copy * count + every for copy in copies])
                value = output[facts, at].repeat_interleave(self.draws, 0).repeat(len(copies), 1)
                changes.append(patch(self.lm, site, value, rows, origin.repeat(len(copies))))
        return changes

    def _from(self, at: Sequence[int], first: int) -> Suffixes:
        """The corrupted runs from each fact's token on; the object's logits are read at their ends."""
        device = self.noisy.tokens.device
        start = torch.tensor(at, device=device).repeat_interleave(self.draws)
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
        """Probability of each object, mean over the draws, one row per copy of the runs."""
        return _chance(logits, label).view(-1, len(self.rows), self.draws).mean(-1)


def _entering(first: int) -> Site:
    """Whose output enters block ``first`` (block 0 starts from the embeddings themselves)."""
    return Site(max(first - 1, 0))


def _answers(rows: Sequence[Row], device: torch.device) -> Int[Tensor, " n"]:
    return torch.tensor([row.ids[row.target] for row in rows], device=device)


def _chance(logits: Float[Tensor, "n vocabulary"], label: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chance: Tensor = torch.softmax(precise, -1).gather(1, label[:, None])[:, 0].double().cpu()
    if not bool(torch.isfinite(chance).all()):
        raise NumericalError("a trace found a probability that is not finite; load the model in float32")
    return chance
