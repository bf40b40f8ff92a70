"""The edit method: a side memory learns the facts of a batch one after another."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, final

import torch
from jaxtyping import Bool
from torch import Tensor
from torchmetrics import Metric

from cakeflow.data import Contexts, EditRequest, builtin_facts
from cakeflow.errors import ConfigError, require_choice, require_count
from cakeflow.evaluation import Evaluation
from cakeflow.forward import TextBatch, encode_batch, encode_texts
from cakeflow.journal import EditStep
from cakeflow.models import LanguageModel, Scope
from cakeflow_sidememory.changes import ShardChange, ShardEnd
from cakeflow_sidememory.distance import activation_name, activation_of
from cakeflow_sidememory.learning import EditRows, Learned, LearningProblem, LearningRule, Rehearsal, learn
from cakeflow_sidememory.questions import RoutedEdit
from cakeflow_sidememory.rehearsals import Rehearsals
from cakeflow_sidememory.rows import Padding, edit_rows, on, sampled_contexts
from cakeflow_sidememory.shards import ShardedProjection, ShardSettings


@final
class SideMemory(RoutedEdit):
    """Keeps facts in a trained copy of one projection, which answers for texts near the edited ones; the model stays.

    WISE (Wang et al. 2024, arXiv 2405.14768). Each fact is learned by gradient descent on the copy, within a random
    part of its entries; a margin keeps the distances of edited and irrelevant texts apart, and the distance decides
    who answers. Batches are learned fact by fact, in their order.

    Args:
        base: Name or folder of a model, or a ``LanguageModel``.
        layer: Block of the projection; negative numbers count from the last. WISE has -5 for Llama-2.
        role: The projection, by its role or its path in the block.
        shards: How shards are kept and routed; its activation is the model's, unless one is named.
        rule: How a fact is learned.
        density: Share of the entries that a shard may change, drawn anew for each.
        padding: How the texts of a fact are put side by side.
        contexts: Texts before the prompt; sampled from the unedited model by default.
        irrelevant: Texts that are not to reach the memory while it learns; by default sentences of the built-in facts
            about other subjects.
        seed: Seed of masks, contexts, and irrelevant texts.
        oracle: Whether an oracle routes the questions of evaluations, for measuring only (``RoutedEdit``).
        evaluation: What the model is asked.
        metrics: Further metrics of every evaluation.
        record_texts: Whether the ledger has the texts of the requests.
        private: Whether only their owner can read the run folders that are made.

    Raises:
        ConfigError: If a setting is out of its range.
    """

    def __init__(
        self,
        base: str | LanguageModel = "smollm2-135m",
        layer: int = -5,
        role: str = "mlp_out",
        shards: ShardSettings | None = None,
        rule: LearningRule = LearningRule(),
        density: float = 0.2,
        padding: Padding = "right",
        contexts: Contexts | None = None,
        irrelevant: Sequence[str] | None = None,
        seed: int = 0,
        oracle: bool = False,
        evaluation: Evaluation = Evaluation(),
        metrics: Sequence[Metric] = (),
        record_texts: bool = True,
        private: bool = True,
    ) -> None:
        if not 0 < density <= 1:
            raise ConfigError(f"density={density}: the share of entries that may change is above 0 and at most 1")
        if rule.rehearsal and shards is not None and shards.rule != "retrieve":
            raise ConfigError(
                f"rehearsal=True keeps shards apart, but shards.rule is {shards.rule!r}; set it to retrieve"
            )
        if oracle and shards is not None and shards.scope == "token":
            raise ConfigError("oracle=True: decisions on single tokens cannot be forced; set shards.scope to prompt")
        require_choice("padding", padding, Padding)
        require_count("seed", seed)
        if irrelevant is not None and not _are_texts(irrelevant):
            raise ConfigError(
                "irrelevant has no text, or one that is blank; give a list of texts, or leave it out for sentences of "
                "the built-in facts"
            )
        self.layer, self.role, self.rule, self.density, self.padding = layer, role, rule, density, padding
        self.shards, self.contexts, self.irrelevant, self.seed = shards, contexts, irrelevant, seed
        super().__init__(base, evaluation, metrics, {}, record_texts=record_texts, private=private)
        self.oracle = oracle
        if isinstance(base, LanguageModel):
            self.check_model()

    def settings(self) -> dict[str, Any]:
        """Return all arguments that decide the outcome."""
        plain = {name: getattr(self, name) for name in ("layer", "role", "density", "padding", "seed", "oracle")}
        texts = None if self.irrelevant is None else list(self.irrelevant)
        shards = None if self.shards is None else asdict(self.shards)
        contexts = None if self.contexts is None else asdict(self.contexts)
        return {**plain, "rule": asdict(self.rule), "shards": shards, "irrelevant": texts, "contexts": contexts,
                "evaluation": repr(self.evaluation)}  # fmt: skip

    def encode(self, requests: Sequence[EditRequest]) -> TextBatch:
        """Tokenize all prompts with their targets in every context; contexts are sampled here if there are none."""
        if self.contexts is None:
            with self.journal.reverted():
                self.contexts = sampled_contexts(self.lm, self.seed)
        return encode_batch(self.lm, requests, self.contexts)

    def prepare(self, batches: Sequence[TextBatch]) -> None:
        """Check that the projection can be copied, and note what the facts will be learned with."""
        if not isinstance(self.lm.module(self.site), ShardedProjection):
            self.lm.weight(self.site)
        self.memory()
        self._rehearsals = Rehearsals(self._recorded)
        parts = {"contexts": repr(self.contexts), "irrelevant": repr(self._texts)}
        self.inputs |= {name: hashlib.sha256(text.encode()).hexdigest() for name, text in parts.items()}

    @cached_property
    def _texts(self) -> list[str]:
        """The irrelevant texts."""
        if self.irrelevant is not None:
            return list(self.irrelevant)
        return [f"{fact.text} {fact.target_true}" for fact in builtin_facts()]

    def edit(self, batch: TextBatch, step: EditStep) -> None:
        """Learn the facts of a batch one after another, and put the memory in place."""
        place = self.lm.architecture.path(self.site)
        numbers: list[Learned] = []
        with self.phase("memory"):
            for start, stop in self._segments(place, len(batch)):
                numbers += self._learn(step, place, batch, range(start, stop))
        for name, values in _summary(numbers).items():
            self.log(f"memory/{name}", values, batch_size=len(batch))

    def memory(self) -> ShardedProjection:
        """Return the side memory as it is now; one that learned nothing if there is none."""
        settings = self.shards or ShardSettings()
        if not settings.activation:
            settings = replace(settings, activation=activation_name(self.lm))
        return ShardedProjection.around(self.lm.module(self.site), settings)

    def _segments(self, place: str, count: int) -> list[tuple[int, int]]:
        """Return the parts of a batch that go into one shard each."""
        memory = self.memory()
        every, done = memory.settings.shard_edits, int(memory.edits)
        bounds = [0, *range(every - done % every, count, every), count]
        return list(pairwise(bounds))

    def _learn(self, step: EditStep, place: str, batch: TextBatch, facts: range) -> list[Learned]:
        """Have one shard learn some facts; put it away when it is full."""
        memory = self.memory()
        done, every = int(memory.edits), memory.settings.shard_edits
        mask = self.mask(memory, done // every)
        weight, least = memory.shards[0].detach(), float(memory.least[0])
        results = []
        activation, scope = activation_of(memory.settings.activation), memory.settings.scope
        for number, fact in enumerate(facts):
            rows = self._rows(batch, fact, done + number, scope)
            problem = LearningProblem(self.lm, self.site, rows, activation)
            learned = learn(problem, weight, mask, self.rule, *self._rehearsal(problem, done + number))
            weight, least = learned.weight, min(least, learned.activation)
            results.append(learned)
        partial = None if self.rule.decay_everywhere else mask
        change = ShardChange.of(place, memory, weight, partial, least, len(facts))
        self.journal.apply(step, change, {"least": least})
        if (done + len(facts)) % every == 0:
            self.journal.apply(step, ShardEnd(place, memory.settings), {})
        return results

    def mask(self, memory: ShardedProjection, shard: int) -> Bool[Tensor, "d_out d_in"]:
        """Draw the entries that a shard may change."""
        generator = torch.Generator().manual_seed((1_000_003 * self.seed + shard) % 2**63)
        weight = memory.shards[0]
        return (torch.rand(weight.shape, generator=generator) < self.density).to(weight.device)

    def _rehearsal(self, problem: LearningProblem, number: int) -> tuple[list[list[Rehearsal]], list[Rehearsal]]:
        """Return the edits that are rehearsed while one is learned: of other shards, and of its own for each step."""
        if not self.rule.rehearsal:
            return [], []
        self._rehearsals.keep(number, problem.rehearsal)
        return self._rehearsals.draw(number, self.memory().settings, self.rule.steps, self.seed)

    def _recorded(self, number: int) -> Rehearsal:
        """Return an edit of the journal, which this run did not learn itself."""
        requests = [request for step in self.journal for request in step.requests]
        if len(requests) < sum(len(step.hashes) for step in self.journal):
            raise ConfigError(
                "rehearsal=True needs the texts of earlier facts, which this run does not record; set record_texts to "
                "true, or rehearsal to false"
            )
        settings = self.memory().settings
        rows = self._rows(self.encode([requests[number]]), 0, number, settings.scope)
        return LearningProblem(self.lm, self.site, rows, activation_of(settings.activation)).rehearsal

    def _rows(self, batch: TextBatch, fact: int, number: int, scope: Scope) -> EditRows:
        subject = batch.requests[fact].subject
        texts = [text for text in self._texts if subject not in text] or self._texts
        text = texts[(self.seed * 7919 + number) % len(texts)]
        (ids,) = encode_texts(self.lm.tokenizer, [text])
        filler = self.lm.tokenizer.eos_token_id or 0
        return on(self.lm.device, edit_rows(batch.rows[fact], ids, self.padding, filler, scope))


def _are_texts(values: Sequence[object]) -> bool:
    """Return whether these are one or more texts, none of them blank; a single text is no list of them."""
    texts = not isinstance(values, str) and all(isinstance(each, str) and each.strip() for each in values)
    return texts and len(values) > 0


def _summary(learned: Sequence[Learned]) -> dict[str, float]:
    """Return the means over facts of what their learning ended with."""
    last = [(each.losses[-1], each.margins[-1], each.activation, len(each.losses)) for each in learned]
    names = ("loss", "margin", "distance", "steps")
    return {name: sum(values) / len(values) for name, values in zip(names, zip(*last, strict=True), strict=True)}
