"""Routes of questions: distance, threshold and decision of every routed module for every prompt of some records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.data import EditRequest
from cakeflow.errors import ConfigError, NumericalError
from cakeflow.evaluation import ScoredPrompt, check_records, scored_prompts
from cakeflow.forward import encode_texts, pad, plan
from cakeflow.journal import request_hash
from cakeflow.metrics import KINDS
from cakeflow.models import LanguageModel, Scope, logits_at, routed

MAX_TOKENS = 4096
"""Most tokens of the prompts that are routed in one pass."""
Side = Literal["above", "below"]
"""Whether a memory answers at distances above its threshold (to what the projection says) or below (to a key)."""


class Measured(NamedTuple):
    """What a routed module measured of the rows of its last pass.

    Attributes:
        distance: The distance that decided.
        threshold: What it was compared with.
        side: On which side of the threshold the memory answers.
    """

    distance: Float[Tensor, " rows"]
    threshold: Float[Tensor, " rows"]
    side: Side


@runtime_checkable
class GivesDistances(Protocol):
    """A routed module that can say by which distances it decided.

    Attributes:
        scope: What a decision holds for.
        decision: The decisions of the last pass.
    """

    scope: Scope
    decision: Tensor | None

    def measured(self) -> Measured:
        """Return distances and thresholds of the rows of the last pass."""

    def own(self, fact: int) -> int:
        """Return the number of the answer that is a fact's own, by its place in the order of learning; 0 for none."""


class Route(NamedTuple):
    """The route of one question.

    Attributes:
        record: Index of the record.
        kind: ``rewrite``, ``paraphrase`` or ``neighborhood``.
        prompt: The prompt.
        place: The routed module, or the name of a retriever.
        distance: The distance that decided; infinite where there is nothing to be near to.
        threshold: What it was compared with.
        side: On which side of it the memory answers.
        decision: Number of the answer; 0 for none of the memory's.
        own: Number of the answer that is the record's own, 0 for questions that are not to be answered from the memory;
            None if the record's fact is not in force.
    """

    record: int
    kind: str
    prompt: str
    place: str
    distance: float
    threshold: float
    side: Side
    decision: int
    own: int | None

    @property
    def in_scope(self) -> bool:
        """True for questions about the edited fact."""
        return self.kind != KINDS[2]

    @property
    def score(self) -> float:
        """The distance, with the sign by which larger ones are nearer to the memory."""
        return self.distance if self.side == "above" else -self.distance


def routes(
    lm: LanguageModel, records: Sequence[EditRequest], facts: Sequence[str] = (), place: str | None = None
) -> list[Route]:
    """Return the routes of all prompts of some records, of each routed module that gives distances.

    A prompt is routed by itself, as before a free answer. In the scope ``sequence`` the route of a prompt with an
    answer may be another one.

    Args:
        lm: The model with its memory.
        records: The records, probes included.
        facts: SHA-256 of each fact in the order in which the memory learned them (``learned``).
        place: Path of one of these modules; all of them by default.

    Raises:
        ConfigError: If no module of the model gives distances, or one decides on each token.
        NumericalError: If a threshold is no number.
        RequestError: If a prompt has no token, or one that the model cannot read.
    """
    modules = _modules(lm, place)
    check_records(lm, records)
    prompts = list(scored_prompts(records))
    rows = encode_texts(lm.tokenizer, [each.prompt for each in prompts])
    numbers: dict[tuple[str, int], tuple[float, float, int]] = {}
    sides: dict[str, Side] = {}
    no_row = torch.empty(0, dtype=torch.long, device=lm.device)
    for group in plan([len(row) for row in rows], MAX_TOKENS):
        ids = pad([rows[i] for i in group], lm.device)
        lengths = torch.tensor([len(rows[i]) for i in group], device=lm.device)
        mask = torch.arange(ids.shape[1], device=lm.device)[None] < lengths[:, None]
        with torch.no_grad(), logits_at(lm, no_row, no_row):  # all logits would take most of the memory
            lm(input_ids=ids, attention_mask=mask.long(), use_cache=False)
        for path, module in modules.items():
            parts, sides[path] = _last_pass(module)
            numbers |= {(path, i): part for i, part in zip(group, parts, strict=True)}
    last = {name: number for number, name in enumerate(facts)}
    hashes = [request_hash(record) for record in records]
    return [
        Route(each.record, KINDS[each.kind], each.prompt, path, *_checked(*numbers[path, i][:2], path),
              sides[path], numbers[path, i][2], own_answer(each, hashes, last, module))
        for path, module in modules.items()
        for i, each in enumerate(prompts)
    ]  # fmt: skip


def _last_pass(module: GivesDistances) -> tuple[list[tuple[float, float, int]], Side]:
    """Return distance, threshold and decision of each row of a module's last pass, and the side that is answered."""
    measured, decision = module.measured(), module.decision
    columns = [each.tolist() for each in (measured.distance, measured.threshold, decision) if each is not None]
    return list(zip(*columns, strict=True)), measured.side


def own_answer(
    question: ScoredPrompt, hashes: Sequence[str], facts: Mapping[str, int], module: GivesDistances
) -> int | None:
    """Return the number of the answer that is a question's own (``Route.own``).

    Args:
        question: The question.
        hashes: SHA-256 of each record.
        facts: SHA-256 of a fact -> its place in the order of learning.
        module: The module that answers.
    """
    if KINDS[question.kind] == KINDS[2]:
        return 0
    name = hashes[question.record]
    return module.own(facts[name]) if name in facts else None


def _modules(lm: LanguageModel, place: str | None) -> dict[str, GivesDistances]:
    """Return the routed modules that give distances, by their paths; only the one at a place that is named."""
    names = {id(module): name for name, module in lm.model.named_modules()}
    every: list[object] = [*routed(lm.model)]
    modules = {names[id(each)]: each for each in every if isinstance(each, GivesDistances)}
    modules = {path: each for path, each in modules.items() if place in (None, path)}
    if not modules:
        raise ConfigError("no module of this model gives routes: edit with a side memory first")
    for place, module in modules.items():
        if module.scope == "token":
            raise ConfigError(f"{place} decides on each token, so that a prompt has no route; set scope to prompt")
    return modules


def _checked(distance: float, threshold: float, place: str) -> tuple[float, float]:
    if math.isnan(threshold) or math.isnan(distance):
        raise NumericalError(
            f"{place}: distance {distance} and threshold {threshold}; a router needs numbers: take the memory from a "
            "copy, or edit again"
        )
    return distance, threshold
