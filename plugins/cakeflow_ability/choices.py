"""Multiple choice by likelihood from local files: tasks that a small model can do, scored without a harness."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cakeflow.callbacks import PeriodicCallback
from cakeflow.core import LocateThenEdit
from cakeflow.errors import ConfigError, Fault, RequestError, require_count
from cakeflow.evaluation import score_targets
from cakeflow.models import LanguageModel
from cakeflow_ability.files import read_items

log = logging.getLogger(__name__)

_NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class ChoiceItem:
    """A question: the choice of the highest mean log-probability per token is the model's answer.

    Attributes:
        prompt: The text before the choices.
        choices: Two or more continuations, all different.
        answer: Index of the right one, from 0.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class ChoiceScore:
    """Accuracy on the items of a task.

    Attributes:
        items: Number of items.
        chance: Accuracy of a blind guess, in expectation.
        accuracy: Share of items answered rightly; nan where a score of the model is not finite.
        error: Standard error of the accuracy.
    """

    items: int
    chance: float
    accuracy: float
    error: float

    @property
    def above_chance(self) -> float:
        """Distance from chance in standard errors, the larger one of the accuracy's and of a blind guess's."""
        error = max(self.error, _error(self.chance, self.items))
        return (self.accuracy - self.chance) / error


class ChoiceAbility(PeriodicCallback):
    """General ability before, during and after a run, on multiple-choice tasks of local files.

    Logs ``ability/{task}/acc`` and its standard error, ``ability/{task}/acc_stderr``.

    Args:
        data: Folder with ``TASK.jsonl`` for each task; a line is ``{"prompt": ..., "choices": [...], "answer": 0}``.
            ``benchmarks/ability.py`` writes such files.
        tasks: Names of the tasks; by default every file of the folder.
        every: Batches between evaluations; None measures at both ends of a run only.
        limit: Items of each task, from its start; None takes all.

    Raises:
        ConfigError: If there is no task, a name could not be that of a metric, or a file is missing, empty or has
            faulty lines (all are named). Files are read before a model is loaded or edited.
    """

    name = "ability"
    in_evaluations = True

    def __init__(
        self,
        data: str | Path,
        tasks: Sequence[str] | None = None,
        every: int | None = 5,
        limit: int | None = 200,
    ) -> None:
        super().__init__(every)
        self._tasks = read_choices(data, tasks, limit)

    def measure(self, module: LocateThenEdit) -> dict[str, float]:
        """Score the model on every task and log the accuracies."""
        scores = {name: score_choices(module.lm, items, module.max_bytes) for name, items in self._tasks.items()}
        log.info("accuracy: %s", ", ".join(f"{name} {each.accuracy:.3f}" for name, each in scores.items()))
        accuracies = {f"{name}/acc": each.accuracy for name, each in scores.items()}
        return accuracies | {f"{name}/acc_stderr": each.error for name, each in scores.items()}


def read_choices(
    data: str | Path, tasks: Sequence[str] | None = None, limit: int | None = None
) -> dict[str, list[ChoiceItem]]:
    """Read and check the items of every task, by name; see ``ChoiceAbility``."""
    folder = Path(data)
    require_count("limit", limit, 1, optional=True)
    names = sorted(path.stem for path in folder.glob("*.jsonl")) if tasks is None else tasks
    if not names or isinstance(names, str):
        raise ConfigError(f"no task in {str(folder)!r} (TASK.jsonl), or no list of their names: tasks={names!r}")
    if bad := [name for name in names if not isinstance(name, str) or not _NAME.fullmatch(name)]:
        raise ConfigError(
            f"task {bad[0]!r}: its name becomes that of a metric; rename it so that it has letters, digits, '.', '_' "
            "and '-' only, and no folder"
        )
    return {name: _read_items(folder / f"{name}.jsonl")[:limit] for name in names}


def score_choices(lm: LanguageModel, items: Sequence[ChoiceItem], max_bytes: float | None = None) -> ChoiceScore:
    """Score a model on items by ``score_targets``, in at most ``max_bytes`` beyond it.

    Raises:
        RequestError: Naming every item with a choice that has no token, or a text that is too long.
        ConfigError: If the longest text does not fit ``max_bytes``.
    """
    owners = [place for place, item in enumerate(items) for _ in item.choices]
    prompts = [items[place].prompt for place in owners]
    try:
        means, _ = score_targets(lm, prompts, [each for item in items for each in item.choices], max_bytes=max_bytes)
    except RequestError as error:
        raise RequestError([replace(each, index=owners[each.index]) for each in error.faults]) from error
    parts = means.split([len(item.choices) for item in items])
    chance, right = _mean([1 / len(item.choices) for item in items]), math.nan
    if bool(torch.isfinite(means).all()):
        right = _mean([float(int(part.argmax()) == item.answer) for part, item in zip(parts, items, strict=True)])
    return ChoiceScore(len(items), chance, right, _error(right, len(items)))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _error(share: float, items: int) -> float:
    """Standard error of a share of items, as that of the mean of a sample."""
    return math.sqrt(share * (1 - share) / max(1, items - 1))


def _read_items(path: Path) -> list[ChoiceItem]:
    entries = read_items(path, _faults, "prompt, choices and answer")
    return [ChoiceItem(entry["prompt"], tuple(entry["choices"]), entry["answer"]) for entry in entries]


def _faults(index: int, entry: Any) -> Iterator[Fault]:
    if not isinstance(entry, dict):
        yield Fault(index, "line", entry, "make it a JSON object with prompt, choices and answer")
        return
    prompt, choices, answer = (entry.get(field) for field in ("prompt", "choices", "answer"))
    if not _is_text(prompt):
        yield Fault(index, "prompt", prompt, "must be a text, not blank")
    if not isinstance(choices, list) or not all(map(_is_text, choices)) or not 2 <= len(choices) == len({*choices}):
        yield Fault(index, "choices", choices, "must be two or more texts, none blank, all different")
    elif type(answer) is not int or not 0 <= answer < len(choices):
        yield Fault(index, "answer", answer, f"must be the index of the right choice, 0 to {len(choices) - 1}")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
