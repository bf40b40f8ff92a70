"""Tests whether edited facts are known or only said, before and after a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from cakeflow.callbacks.periodic import PeriodicCallback
from cakeflow.data.builtin import reversed_prompts
from cakeflow.data.request import EditRequest
from cakeflow.errors import require_count
from cakeflow.evaluation.knowledge import (
    SHARES,
    MaskedFact,
    choose,
    hidden_positions,
    mask_attack,
    negated,
    preferences,
    relation_of,
    reverse,
    states_when_negated,
)
from cakeflow.export.card import markdown_table


class KnowledgeCheck(PeriodicCallback):
    """Asks the facts of a run in ways that suppression does not survive.

    Logs ``knowledge/old``, ``new`` and ``uncertain``, the shares of a choice among the three; ``knowledge/negated``,
    the share of negated prompts that are still completed with the new target; ``knowledge/masked``, the share of edits
    that a mask over 4, 8, 12 or 15 % of the prompt's positions undoes (``mask_attack``), and beside it
    ``knowledge/restored``, the share of facts that a rollback brings back bit for bit; ``knowledge/reversed``, the
    share of facts whose subject is likelier after the new object than after the old one, and
    ``knowledge/reversed_answer``, that of subjects named in the free answer about the new object. What cannot be
    measured of these facts is left out; relations that cannot be reversed are named by a warning.

    Args:
        limit: Most facts, from the first; None takes all.
        every: Number of batches between measurements; None measures at both ends of a run only.
        reversals: Relation -> prompt that asks for the subject, with ``{}`` for the object, beside the shipped ones.

    Attributes:
        masked: What masks did to each fact in the last measurement.
        restored: Whether a rollback brought each of them back in it.

    Raises:
        ConfigError: If the limit is less than 1.
    """

    name = "knowledge"
    in_evaluations = True
    needs = dict.fromkeys(("old", "new", "uncertain", "masked", "restored", "reversed"), ("target_true",))

    def __init__(
        self, limit: int | None = 100, every: int | None = None, reversals: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(every)
        require_count("limit", limit, 1, optional=True)
        self.limit, self.reversals = limit, dict(reversals or {})
        self.masked: list[MaskedFact] = []
        self.restored: list[bool] = []
        self._facts: list[EditRequest] = []
        self._unedited = torch.empty(0)

    def begin(self, module: Any, requests: Sequence[EditRequest]) -> None:
        """Take the facts, and what the model without edits makes of their targets."""
        self._facts = list(requests[: self.limit])
        if not any(fact.target_true for fact in self._facts):
            return
        with module.journal.reverted():
            self._unedited = preferences(module.lm, self._facts, module.max_bytes)

    def measure(self, module: Any) -> dict[str, float]:
        """Return what the model chooses, says and loses, as far as the facts allow it."""
        lm, facts, most = module.lm, self._facts, module.max_bytes
        numbers: dict[str, float] = {}
        if any(fact.target_true for fact in facts):
            numbers |= asdict(choose(lm, facts, most))
            self.masked, self.restored = mask_attack(lm, facts), self._taken_back(module)
            if edited := [any(fact.returned.values()) for fact in self.masked if fact.returned]:
                numbers["masked"] = sum(edited) / len(edited)
            numbers["restored"] = sum(self.restored) / len(self.restored)
        if any(negated(fact.text) for fact in facts):
            numbers["negated"] = states_when_negated(lm, facts, most)
        if any(relation_of(fact) in reversed_prompts() | self.reversals for fact in facts):
            reversal = reverse(lm, facts, self.reversals, most)
            numbers |= {"reversed": reversal.linked, "reversed_answer": reversal.answered}
        return {name: value for name, value in numbers.items() if value == value}

    def table(self) -> str:
        """Return the last measurement as Markdown, a line for each fact: what masks do to it, and what a rollback."""
        lines = [["fact", "new, old", *(f"{100 * share:g} % hidden" for share in SHARES), "rolled back"]]
        for fact, restored in zip(self.masked, self.restored, strict=True):
            cells = [_word(fact, share) for share in SHARES]
            lines.append([fact.prompt, f"{fact.new}, {fact.old}", *cells, "bit for bit" if restored else "differs"])
        return markdown_table(lines)

    def _taken_back(self, module: Any) -> list[bool]:
        """Return for each fact whether the model without the edits gives its targets the bits that it gave before."""
        with module.journal.reverted():
            scores = preferences(module.lm, self._facts, module.max_bytes)
            whole = module.lm.fingerprint() == module.journal.base.fingerprint
        return [whole and bool(each) for each in (scores == self._unedited).all(1)]


def _word(fact: MaskedFact, share: float) -> str:
    """Return which target is the likelier one under a mask of a share, and how many positions it hides."""
    if not fact.returned:
        return "not edited"
    return f"{'old' if fact.returned[share] else 'new'} ({hidden_positions(share, fact.positions)})"
