"""``cakeflow diff``: two edited models side by side, whatever they are stored as."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from cakeflow.cli.console import say
from cakeflow.data.builtin import builtin_facts
from cakeflow.data.request import EditRequest
from cakeflow.errors import ConfigError, require_count
from cakeflow.evaluation.outcome import TOKENS, free_answers
from cakeflow.journal.audit import replay
from cakeflow.journal.steps import facts_in_force
from cakeflow.journal.store import ledger_path
from cakeflow.models.language import LanguageModel
from cakeflow.models.loading import Loading, load_model
from cakeflow.report.tables import rows_table

Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Side:
    """One of the two models.

    Attributes:
        name: Its name or folder.
        lm: The model, with its edits.
        facts: The facts in force, if it is a run whose texts were stored.
    """

    name: str
    lm: LanguageModel
    facts: list[EditRequest]

    @classmethod
    def of(cls, name: str, model: str | None, loading: Loading = Loading()) -> Side:
        """The model of a run folder, or a model by name or folder.

        Args:
            name: The run folder, or the model.
            model: The unedited model of a run, if it cannot be loaded by its name there.
            loading: How a model is loaded.
        """
        if not ledger_path(Path(name)).exists():
            return cls(name, load_model(name, **loading.arguments()), [])
        journal = replay(Path(name), model, loading=loading)
        lm = journal.model
        assert isinstance(lm, LanguageModel)
        return cls(name, lm, [step.requests[i] for step, i in facts_in_force(journal) if step.requests])


def run_diff(
    first: str, second: str, model: str | None = None, asks: int = 40, loading: Loading = Loading()
) -> dict[str, Rows]:
    """Compare two runs, exports or models: facts, answers, weights.

    Args:
        first: A run folder, or a model by name or folder.
        second: The other one.
        model: The unedited model of the runs, if it cannot be loaded by the name that they were started with.
        asks: Number of built-in facts to ask beside the edited ones.
        loading: --loading.NAME, how a model is loaded.

    Raises:
        ConfigError: If the two are not of one architecture, or ``asks`` is negative.
        ResumeError: If a run belongs to another model, or leads to other weights here.
    """
    require_count("asks", asks)
    sides = Side.of(first, model, loading), Side.of(second, model, loading)
    tables = {
        "Facts": list(_facts(*sides)),
        "Answers that differ": list(_answers(*sides, asks)),
        "Weights that differ": list(_weights(*sides)),
    }
    for title, rows in tables.items():
        if rows:
            Console().print(rows_table(rows, title))
        else:
            say(f"{title}: none")
    return tables


def _facts(first: Side, second: Side) -> Iterator[dict[str, str]]:
    """Yield the facts that one side has only, or that have another target there."""
    targets = [{fact.text: fact.target_new for fact in side.facts} for side in (first, second)]
    for text in dict.fromkeys([*targets[0], *targets[1]]):
        row = {"prompt": text, "first": targets[0].get(text, ""), "second": targets[1].get(text, "")}
        if row["first"] != row["second"]:
            yield row


def _answers(first: Side, second: Side, asks: int) -> Iterator[dict[str, str]]:
    """Yield the prompts to which the models give other answers."""
    texts = [fact.text for fact in (*first.facts, *second.facts, *builtin_facts()[:asks])]
    prompts = list(dict.fromkeys(texts))
    columns = (free_answers(side.lm, prompts, TOKENS) for side in (first, second))
    for prompt, one, other in zip(prompts, *columns, strict=True):
        if one != other:
            yield {"prompt": prompt, "first": one.strip(), "second": other.strip()}


def _weights(first: Side, second: Side) -> Iterator[dict[str, str]]:
    """Yield the tensors that differ, with the norm of the difference over that of the first."""
    one, other = first.lm.model.state_dict(), second.lm.model.state_dict()
    if {name: each.shape for name, each in one.items()} != {name: each.shape for name, each in other.items()}:
        raise ConfigError(f"{first.name} and {second.name} have other tensors; compare models of one architecture")
    for name, tensor in one.items():
        if not torch.equal(tensor, other[name].to(tensor.dtype)):
            change = (tensor.double() - other[name].double()).norm() / tensor.double().norm()
            yield {"tensor": name, "relative change": f"{float(change):.3g}"}
