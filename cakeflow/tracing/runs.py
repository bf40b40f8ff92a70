"""The three kinds of runs of a causal trace, for a group of facts at once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cakeflow.architecture import Site
from cakeflow.batch import Row, pad
from cakeflow.errors import NumericalError
from cakeflow.model import LanguageModel
from cakeflow.suffixes import Recording, Suffixes, first_changed, take
from cakeflow.tap import capture, restore


@dataclass(frozen=True, eq=False)
class Runs:
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
    ) -> Runs:
        """Do the clean and the corrupted runs; the noise is added to the embeddings."""
        ids = pad([row.ids[: row.target] for row in rows], lm.device)
        sites = sorted({site for span in spans for site in span}, key=lambda site: site.layer)
        with capture(lm, sites) as outputs:
            logits = lm.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
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
        return self._go_on(suffixes, self.lm.depth, [])

    def restored(self, at: Sequence[int]) -> Float[Tensor, "n l"]:
        """Probability of each object with each span's clean output put back at one token.

        Args:
            at: The token of each fact; one past a fact's end stands for its last.
        """
        at = [min(token, row.target - 1) for token, row in zip(at, self.rows, strict=True)]
        firsts = [first_changed(span[0]) for span in self.spans]
        suffixes, facts = self._from(at, min(firsts)), range(len(at))
        values = {site: output[facts, at].repeat_interleave(self.draws, 0) for site, output in self.outputs.items()}
        found = []
        for first, span in zip(firsts, self.spans, strict=True):
            changes = [restore(self.lm, site, values[site], suffixes.origin) for site in span]
            found.append(self._go_on(suffixes, first, changes))
        return torch.stack(found, 1)

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

    def _go_on(
        self, suffixes: Suffixes, first: int, changes: Sequence[AbstractContextManager[None]]
    ) -> Float[Tensor, " n"]:
        """Run from block ``first`` on what enters it in the corrupted runs."""
        entering = take(self.noisy.outputs[_entering(first)], suffixes.positions)
        logits = replace(suffixes, first=first, hidden=entering).run(self.lm, *changes)
        return _chance(logits, suffixes.label).view(-1, self.draws).mean(1)


def _entering(first: int) -> Site:
    """Whose output enters block ``first`` (block 0 starts from the embeddings themselves)."""
    return Site(max(first - 1, 0))


def _answers(rows: Sequence[Row], device: torch.device) -> Int[Tensor, " n"]:
    return torch.tensor([row.ids[row.target] for row in rows], device=device)


def _chance(logits: Float[Tensor, "n vocabulary"], label: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    chance: Tensor = torch.softmax(logits.double(), -1).gather(1, label[:, None])[:, 0].cpu()
    if not bool(torch.isfinite(chance).all()):
        raise NumericalError("a trace found a probability that is not finite; load the model in float32")
    return chance
