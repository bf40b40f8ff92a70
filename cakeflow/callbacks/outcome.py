"""The outcome of a run in a reader's sense: free answers before and after, and a budget for side effects."""

from __future__ import annotations

import warnings
from collections.abc import Container, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from cakeflow.data.request import EditRequest
from cakeflow.errors import SideEffectWarning, listed, require_count
from cakeflow.evaluation.outcome import (
    Outcome,
    ask,
    fact_questions,
    familiar_facts,
    neighbor_questions,
    rates,
    with_own_answers,
)
from cakeflow.journal.policy import Policy
from cakeflow.journal.schema import FreeAnswer
from cakeflow.journal.steps import request_hash
from cakeflow.models.language import LanguageModel

MOST_DROP = 0.25
"""Default budget: the part of familiar facts that may be lost."""
MOST = {"neutral/kl": 0.1, "health/state": 1.0}
"""Default budget: nats of divergence on neutral text, and ``StreamHealth`` short of broken."""


class OutcomeCheck(L.Callback):
    """Asks the model freely in both evaluations of a run: edited facts, their neighbors, and facts that it states.

    Every fact is asked as a completion and, where the tokenizer has a chat template, as the user's turn. Answers of
    neighbors are compared with the unedited model's. Logs the shares of good answers with the other metrics
    (``learned``, ``learned_chat``, ``familiar``, ``familiar_chat``, ``neighbors``), so that a ``Policy`` can bound
    them. ``Editor.fit`` and ``cakeflow fit`` have one by default.

    Args:
        familiar: Number of built-in facts that the unedited model states, in each form.
        neighbors: Number of neighbors.
        chat: Whether to ask in a chat too.
        budget: Rules whose breach is a ``SideEffectWarning``, or a YAML file of them; ``PolicyGuard`` takes a run back
            instead. By default familiar facts may fall by 0.25, ``neutral/kl`` be 0.1 and ``health/state`` 1, where
            they were measured.

    Raises:
        ConfigError: If a number is negative or not whole, or the file cannot be read as a policy.
    """

    def __init__(
        self, familiar: int = 16, neighbors: int = 40, chat: bool = True, budget: Policy | str | Path | None = None
    ) -> None:
        for name, value in (("familiar", familiar), ("neighbors", neighbors)):
            require_count(name, value)
        self.familiar, self.neighbors, self.chat = familiar, neighbors, chat
        self.budget = Policy.read(budget) if isinstance(budget, (str, Path)) else budget
        self._requests: list[EditRequest] = []
        self._answers: list[FreeAnswer] = []

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Ask all questions, in the evaluations before and after the edits."""
        if not isinstance(pl_module.lm, LanguageModel):  # pictures are not asked about in words
            return
        if trainer.sanity_checking or pl_module.stage not in ("before", "after"):
            return
        with pl_module.phase("evaluation"):
            requests = [request for batch in trainer.val_dataloaders for request in batch.requests]  # type: ignore[union-attr]
            if pl_module.stage == "before" or requests != self._requests:
                self._begin(pl_module, requests)
            if pl_module.stage == "after":
                texts = ask(pl_module.lm, self._answers, pl_module.max_bytes, pl_module.question)
                pairs = zip(self._answers, texts, strict=True)
                self._answers = [each.model_copy(update={"after": text}) for each, text in pairs]
        pl_module.further |= rates(self._answers, pl_module.stage)
        if pl_module.stage == "after":
            reasons = _reasons(pl_module, self._requests)
            pl_module.outcome = Outcome(self._answers, reasons, condition=pl_module.condition)
            if trainer.state.fn != TrainerFn.FITTING:  # an evaluation after a run whose last one came too early
                self._judge(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Compare everything that was logged with the budget, and warn of what goes beyond it."""
        self._judge(trainer, pl_module)

    def _begin(self, module: Any, requests: list[EditRequest]) -> None:
        """Ask the unedited model and, where there are earlier edits, the model as it is."""
        lm, limit = module.lm, module.max_bytes
        forms = ("completion", "chat") if self.chat and lm.chats else ("completion",)
        questions = fact_questions(requests, forms) + neighbor_questions(requests, self.neighbors)
        with module.journal.reverted():
            self._answers = list(with_own_answers(questions, ask(lm, questions, limit)))
            if self.familiar:
                subjects = [request.subject for request in requests]
                fingerprint = module.journal.base.fingerprint
                self._answers += familiar_facts(lm, fingerprint, forms, self.familiar, subjects, limit)
        if module.journal.edits and module.stage == "before":  # else the model before the run is gone
            pairs = zip(self._answers, ask(lm, self._answers, limit, module.question), strict=True)
            self._answers = [each.model_copy(update={"before": text}) for each, text in pairs]
        self._requests = requests

    def _judge(self, trainer: L.Trainer, module: Any) -> None:
        """Note the rules of the budget that a finished run broke."""
        if module.outcome is None or not module.complete:
            return
        after = {name: float(value) for name, value in trainer.callback_metrics.items()}
        before, after = module.metrics_at.get("before", {}), after | module.metrics_at.get("after", {}) | module.further
        faults = list((self.budget or _default_budget({*before} & {*after}, after)).violations(before, after))
        module.outcome = replace(module.outcome, side_effects=faults)
        if faults:
            warnings.warn(
                f"side effects beyond the budget: {listed(faults)}; take the batches back, edit fewer facts at once, "
                "or use another recipe; a PolicyGuard with these rules takes such a run back by itself",
                SideEffectWarning,
                stacklevel=2,
            )


def _default_budget(both: set[str], after: Container[str]) -> Policy:
    """Return the default rules for the metrics that were measured on both sides, or after the run."""
    return Policy(
        max_drop={name: MOST_DROP for name in ("familiar", "familiar_chat") if name in both},
        maximum={name: bound for name, bound in MOST.items() if name in after},
    )


def _reasons(module: Any, requests: Sequence[EditRequest]) -> dict[int, str]:
    """Return why facts of the run did not take, by their place, as far as the last batch that wrote each noted it."""
    steps, names = module.journal[module.first_step :], map(request_hash, requests)
    last = {name: fact for s in steps for name, fact in zip(s.hashes, s.facts or [None] * len(s.hashes), strict=True)}
    facts = {i: last.get(name) for i, name in enumerate(names)}
    return {i: fact.reason for i, fact in facts.items() if fact is not None and not fact.taken}
