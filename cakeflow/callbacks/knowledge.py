"""Tests whether edited facts are known or only said, before and after a run."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import lightning as L

from cakeflow.callbacks.periodic import PeriodicCallback
from cakeflow.data.request import EditRequest
from cakeflow.errors import ConfigError
from cakeflow.evaluation.knowledge import choose, negated, returns_when_masked, states_when_negated


class KnowledgeCheck(PeriodicCallback):
    """Asks the facts of a run in ways that suppression does not survive.

    Logs ``knowledge/old``, ``new`` and ``uncertain``, the shares of a choice among the three; ``knowledge/negated``,
    the share of negated prompts that are still completed with the new target; and ``knowledge/masked``, the share of
    edits that a mask over 4 to 15 % of the prompt's positions undoes, by our reading of that attack. What cannot be
    measured of these facts is left out.

    Args:
        limit: Most facts, from the first; None takes all.
        every: Number of batches between measurements; None measures at both ends of a run only.

    Raises:
        ConfigError: If the limit is less than 1.
    """

    name = "knowledge"
    needs = dict.fromkeys(("old", "new", "uncertain", "masked"), ("target_true",))

    def __init__(self, limit: int | None = 100, every: int | None = None) -> None:
        super().__init__(every)
        if limit is not None and limit < 1:
            raise ConfigError(f"limit must be at least 1 fact, got {limit}")
        self.limit = limit
        self._facts: list[EditRequest] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Read the facts of the run before its first batch."""
        if batch_idx == 0:
            batches: Any = trainer.train_dataloader or ()
            self._facts = [request for each in batches for request in each.requests][: self.limit]
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def measure(self, module: Any) -> dict[str, float]:
        """Return what the model chooses, says and loses, as far as the facts allow it."""
        numbers: dict[str, float] = {}
        if any(fact.target_true for fact in self._facts):
            numbers |= asdict(choose(module.lm, self._facts, module.max_bytes))
            numbers["masked"] = returns_when_masked(module.lm, self._facts)
        if any(negated(fact.text) for fact in self._facts):
            numbers["negated"] = states_when_negated(module.lm, self._facts, module.max_bytes)
        return {name: value for name, value in numbers.items() if value == value}
