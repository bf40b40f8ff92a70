"""Numbers for a model that nobody has tuned: trials on facts that it knows, within a budget of edits."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cakeflow.data.contexts import Contexts
from cakeflow.data.request import EditRequest
from cakeflow.data.sources import Source, read_requests
from cakeflow.data.text import states
from cakeflow.errors import ConfigError, visible
from cakeflow.evaluation.outcome import TOKENS, free_answers
from cakeflow.forward.generation import generate_contexts
from cakeflow.models.architecture import Site
from cakeflow.models.language import LanguageModel
from cakeflow.storage.yaml_text import dump_yaml
from cakeflow.tracing.facts import Fact
from cakeflow.tracing.trace import CausalTrace
from cakeflow.tracing.window import known_scores, locate
from cakeflow.tuning.trials import Numbers, Trial, Trials

VALUES: dict[str, tuple[Any, ...]] = {
    "lr": (0.1, 0.2, 0.5, 1.0),
    "layers": (-4, -2, 0, 2, 4),
    "steps": (15, 25, 50),
    "null_threshold": (0.005, 0.01, 0.02, 0.05),
    "cov_weight": (1_500.0, 5_000.0, 15_000.0, 50_000.0),
}
"""Number -> values that are tried, in this order of numbers; windows of layers by their distance from the trace's."""
RECIPE, RECIPES = "alphaedit", {"cov_weight": "memit"}
"""Recipe of the trials, and of those numbers that do not count in it."""
WINDOW = 5
"""Number of layers to edit."""
FEWEST = 4
"""Fewest facts of a trial."""


@dataclass(frozen=True)
class Tuning:
    """A model's numbers, and how they were chosen.

    Attributes:
        base: The model, as it is loaded.
        numbers: The best numbers.
        scores: Causal score of each of their layers.
        contexts: Texts around the prompts.
        corpus: Settings of the second moments' corpus.
        reason: Why the layers were looked for where they were.
        trials: The trials that the choice was made on, in order.
        checks: Trials on other facts: with the first numbers, and with the best.
        left_out: Numbers that the budget did not reach.
    """

    base: str
    numbers: Numbers
    scores: dict[int, float]
    contexts: Contexts
    corpus: dict[str, Any]
    reason: str
    trials: Sequence[Trial]
    checks: Sequence[Trial]
    left_out: Sequence[str]

    def config(self) -> str:
        """Return the numbers as a model config, with the evidence as comments."""
        model = {"base": self.base, **self.numbers.parts()}
        model["statistics"] = {**self.corpus, **model["statistics"]}
        model["contexts"] = {"groups": [list(group) for group in self.contexts.groups]}
        model["scores"] = {layer: round(score, 4) for layer, score in self.scores.items()}
        data = dump_yaml({"model": model})
        return "".join(f"# {visible(line)}\n" for line in self._evidence()) + data

    def _evidence(self) -> Iterator[str]:
        yield f"Numbers for {self.base}, chosen by 'cakeflow tune' on facts that it states."
        yield f"Layers: {self.reason}."
        yield "Each trial edits the same facts in one batch and takes them back; score: harmonic mean of shares (%)."
        yield from map(_line, self.trials)
        yield "On facts that the choice was not made on, with the first numbers and with these:"
        yield from map(_line, self.checks)
        if self.left_out:
            yield f"Not tried, because the budget of edits was spent: {', '.join(self.left_out)}."


def _line(trial: Trial) -> str:
    return f"  {trial.recipe:10} {trial.name:28} {trial.result}"


def tune(
    lm: LanguageModel,
    base: str,
    trials: Path,
    *,
    data: Any = "builtin",
    edits: int = 400,
    facts: int = 20,
    source: Source | None = None,
    tokens: int | None = None,
    notify: Callable[[Trial], Any] = lambda trial: None,
) -> Tuning:
    """Choose layers, learning rate, steps, threshold and weight of the preserved keys, one after another.

    A trace proposes the layers. Then each number takes its values in turn, the others as they are best so far, in one
    batch over the same facts. What is chosen is measured on other facts, beside the numbers of the beginning.

    Args:
        lm: The model, not edited.
        base: Its name, as the config will have it.
        trials: File of the trials, which goes on where it was interrupted.
        data: Facts with true targets, of which those are taken that the model states.
        edits: Most edits in all, those on other facts included.
        facts: Facts of a trial; fewer where the model states less than twice as many.
        source: Corpus of the second moments; None takes texts about names (``default_corpus``).
        tokens: Its tokens; by default ten times the width of the keys.
        notify: Called with every trial.

    Raises:
        ConfigError: If the model states too few of the facts, or the budget is too small for one choice.
        RequestError: Listing every bad request.
    """
    if facts < FEWEST or edits < 4 * facts:
        raise ConfigError(
            f"facts must be at least {FEWEST} and edits at least four times as many (the first numbers, another value, "
            f"and both on other facts); got facts={facts} and edits={edits}"
        )
    pool = [request for request in read_requests(data) if request.target_true]
    stated, candidates = stated_facts(lm, pool)[: 2 * facts], [Fact.of(request) for request in pool]
    search, others = stated[::2], stated[1::2]
    proposal = locate(lm, min(WINDOW, lm.depth), candidates)
    corpus = {"source": source, "tokens": tokens or 10 * lm.key_width(Site(proposal.layers[0], "mlp_out"))}
    records = Trials(lm, generate_contexts(lm), corpus, trials, notify)
    first, most = Numbers(tuple(proposal.layers)), (edits - 2 * len(others)) // len(search)

    def score(name: str, value: Any, numbers: Numbers) -> float | None:
        recipe = RECIPES.get(name, RECIPE)
        if len(records.made) >= most and records.key(numbers, search, recipe) not in records.made:
            return None
        return records.make(f"{name} {value}", numbers, search, recipe).score

    best, left_out = best_numbers(first, lm.depth, score)
    made = list(records.made.values())
    checks = [records.make(name, each, others, RECIPE) for name, each in (("first", first), ("chosen", best))]
    scores = known_scores(lm, CausalTrace(), best.layers, candidates)
    return Tuning(base, best, scores, records.contexts, corpus, proposal.reason, made, checks, left_out)


def best_numbers(
    first: Numbers, depth: int, score: Callable[[str, Any, Numbers], float | None]
) -> tuple[Numbers, list[str]]:
    """Return the best numbers, chosen one after another, and the names of those that were not reached.

    Args:
        first: Numbers to begin with; one of them stays unless another value is better.
        depth: Number of the model's blocks.
        score: Score of some numbers, called with the name and the value that are tried too; None once the budget is
            spent.
    """
    best = first
    for place, name in enumerate(VALUES):
        highest, choice = -1.0, best
        for value in _in_order(name, best, depth):
            numbers = replace(best, **{name: value})
            reached = score(name, value, numbers)
            if reached is None:
                return choice, list(VALUES)[place:]
            if reached > highest:
                highest, choice = reached, numbers
        best = choice
    return best, []


def stated_facts(lm: LanguageModel, requests: Sequence[EditRequest]) -> list[EditRequest]:
    """Return the facts whose true target the model states as a free answer, in random order.

    Raises:
        ConfigError: If it states fewer than twice ``FEWEST``.
    """
    pool = random.Random(0).sample(requests, len(requests))
    answers = free_answers(lm, [fact.text for fact in pool], TOKENS)
    facts = [fact for fact, answer in zip(pool, answers, strict=True) if states(answer, fact.target_true or "")]
    if len(facts) < 2 * FEWEST:
        raise ConfigError(
            f"the model states {len(facts)} of {len(pool)} facts, and {2 * FEWEST} are needed to tune on; the built-in "
            "ones are in English: for another language give facts with true targets that it knows, --data FILE"
        )
    return facts


def _in_order(name: str, best: Numbers, depth: int) -> Sequence[Any]:
    """Return the values of a number to try, the present one first."""
    present, values = getattr(best, name), VALUES[name]
    if name == "layers":
        windows = [tuple(layer + shift for layer in present) for shift in values]
        values = tuple(window for window in windows if window[0] > 0 and window[-1] < depth)
    return [present, *(value for value in values if value != present)]
