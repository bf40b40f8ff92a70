"""General ability: language tasks scored by lm-evaluation-harness on the model in memory."""

from __future__ import annotations

import copy
import io
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import yaml
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from cakeflow import ranks
from cakeflow.errors import ConfigError, Fault, require_count
from cakeflow.evaluation import score_reads
from cakeflow.models import LanguageModel
from cakeflow_ability.files import read_items

TASKS = ("sst2", "mrpc", "cola", "rte", "nli", "mmlu")
"""Tasks that read ``FOLDER/NAME.jsonl``; prompts and fields stand in ``prompts/NAME.yaml``."""


DRAWS = 1000
"""Resamples behind the standard errors of F1 and MCC."""


Counts = npt.NDArray[np.int64]


Numbers = npt.NDArray[np.float64]


def general_ability(
    lm: LanguageModel,
    data: str | Path | None = None,
    tasks: Sequence[str] = TASKS,
    limit: int | None = 100,
    *,
    trust_task_code: bool = False,
) -> dict[str, float]:
    """Score a model on language tasks, zero-shot, by the likelihood of each answer.

    Args:
        lm: The model, which stays unchanged.
        data: Folder with ``NAME.jsonl`` for each local task, GLUE's or MMLU's fields on every line. Without a folder,
            every task is lm-eval's own.
        tasks: Names from ``TASKS``; any other is a task or group of lm-eval, whose data comes from the hub, or a task
            file in its format.
        limit: Items of each task, from its start; None takes all.
        trust_task_code: Whether task files may be used, whose Python and templates lm-eval runs.

    Returns:
        For each local task ``{task}/acc``, ``{task}/f1`` (mean over classes, weighted by their items) and
        ``{task}/mcc`` (Matthews), each with its standard error as ``..._stderr``: 1.96 of it to either side is a 95 %
        interval, some 0.1 for accuracy on 100 items. For lm-eval's tasks, their own metrics. All nan where the model's
        scores are not finite.

    Raises:
        ConfigError: If lm-eval is not installed, a task is unknown or cannot be loaded, or a file is missing, empty or
            has faulty lines (all are named).
    """
    loaded = load_tasks(data, tasks, limit, trust_task_code=trust_task_code)
    return score_tasks(lm, loaded, limit)


def load_tasks(
    data: str | Path | None, tasks: Sequence[str], limit: int | None = 100, *, trust_task_code: bool = False
) -> dict[str, Any]:
    """Read and check the items of tasks, as lm-eval's ``evaluate`` takes them; see ``general_ability``."""
    require_count("limit", limit, 1, optional=True)
    if not tasks:
        raise ConfigError(f"name at least one task, got tasks={tasks!r}")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(f"general ability needs lm-eval: pip install 'cakeflow[eval]' ({error})") from error
    local = set(TASKS) if data is not None else set()
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}}
    with _quiet():
        manager = TaskManager(include_defaults=not local.issuperset(tasks))
        own_names = {*local, *(() if trust_task_code else manager.all_tasks)}
        if not trust_task_code and (unknown := [name for name in tasks if name not in own_names]):
            raise ConfigError(
                f"task {unknown[0]!r} is none of {', '.join(TASKS)}, which need data=FOLDER, nor one of lm-eval's own; "
                "a task file may bring Python and templates, which lm-eval runs: if you trust it, say "
                "--trust_task_code on the command line, or trust_task_code=True in Python"
            )
        for name in tasks:
            if name in local:
                entry = manager.load([_local_task(name, Path(str(data)), limit)])
            else:
                entry = load_other(manager, name)
            for kind, members in loaded.items():
                members.update(entry[kind])
    return loaded


def load_other(manager: Any, name: str) -> dict[str, Any]:
    """Load a task or group of lm-eval's own, by name or file, from its ``TaskManager``."""
    try:
        return dict(manager.load([name]))
    except Exception as error:  # a task's own code may raise anything when its data cannot be downloaded
        raise ConfigError(
            f"task {name!r} cannot be loaded by lm-eval, whose tasks need the hub; cakeflow's own ({', '.join(TASKS)}) "
            f"need data=FOLDER with a .jsonl file of each: {type(error).__name__}: {error}"
        ) from error


def _local_task(name: str, folder: Path, limit: int | None) -> dict[str, Any]:
    """Return one of ``TASKS`` as lm-eval's task configuration."""
    text = files("cakeflow_ability").joinpath("prompts", f"{name}.yaml").read_text(encoding="utf-8")
    return {
        "task": name,
        "output_type": "multiple_choice",
        "num_fewshot": 0,
        "test_split": "test",
        "custom_dataset": partial(_read_items, folder / f"{name}.jsonl", limit),
        "doc_to_target": "choice",
        "metric_list": [
            {"metric": name, "aggregation": rule, "higher_is_better": True} for name, rule in METRICS.items()
        ],
        **yaml.safe_load(text),
    }


def _read_items(
    path: Path, limit: int | None, *, fields: Sequence[str], label: str, labels: Sequence[object], **_: object
) -> dict[str, Any]:
    """Read the items of a file: the fields, and the label's index among the choices. All lines are checked."""
    from datasets import Dataset

    faults = partial(_faults, fields=fields, label=label, labels=labels)
    entries = read_items(path, faults, f"{', '.join(fields)} and {label}")
    places = [str(each) for each in labels]
    items = [
        {**{field: entry[field] for field in fields}, "choice": places.index(str(entry[label]))} for entry in entries
    ]
    return {"test": Dataset.from_list(items[:limit])}


def _faults(index: int, entry: object, fields: Sequence[str], label: str, labels: Sequence[object]) -> Iterator[Fault]:
    if not isinstance(entry, dict):
        yield Fault(index, "line", entry, f"make it a JSON object with {', '.join(fields)} and {label}")
        return
    for field in fields:
        value = entry.get(field)
        texts = value if isinstance(value, list) and len(value) == len(labels) else [value]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            yield Fault(index, field, value, "must be a text, not blank; of choices, one for each answer")
    if str(entry.get(label)) not in map(str, labels):
        yield Fault(index, label, entry.get(label), f"must be one of {', '.join(map(str, labels))}")


def score_tasks(
    lm: LanguageModel, tasks: Mapping[str, Any], limit: int | None = 100, max_bytes: float | None = None
) -> dict[str, float]:
    """Score a model on tasks that ``load_tasks`` read, in at most ``max_bytes`` beyond it; see ``general_ability``.

    Several ranks share the items in lm-eval's own way. Accuracies are those of one process; standard errors by
    resampling are of the same items in another order.

    Raises:
        ConfigError: If the longest text does not fit ``max_bytes``.
    """
    from lm_eval import evaluate

    for task in tasks["tasks"].values():
        task.set_fewshot_seed(0)  # the same examples in every evaluation
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    with _quiet(), lm.running():
        harness = _harness(lm, max_bytes)
        results = evaluate(harness, dict(tasks), limit=limit, bootstrap_iters=DRAWS)
    finite = all(harness.gather_object(harness.finite))
    return ranks.on_first(lambda: _numbers(results, tasks, finite=finite))  # lm-eval has the results on one rank


def _numbers(results: Mapping[str, Any], tasks: Mapping[str, Any], *, finite: bool) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for name, row in {**results["results"], **results.get("groups", {})}.items():
        numbers |= {f"{name}/{metric}": value for metric, value in _plain(row).items()}
    for name, task in tasks["tasks"].items():
        for metric, rule in task.aggregation().items():
            if isinstance(rule, Agreement):
                numbers[f"{name}/{metric}_stderr"] = rule.error([sample[metric] for sample in results["samples"][name]])
    return numbers if finite else dict.fromkeys(numbers, math.nan)


def _plain(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a row of results with the keys ``metric,filter`` and ``metric_stderr,filter``."""
    numbers = {}
    for key, value in row.items():
        metric, _, kind = key.partition(",")
        if kind and isinstance(value, (int, float)):
            name = metric.removesuffix("_stderr") + ("" if kind == "none" else f"_{kind}")
            numbers[name + ("_stderr" if metric.endswith("_stderr") else "")] = float(value)
    return numbers


def _harness(lm: LanguageModel, max_bytes: float | None) -> Any:
    """Wrap the model for lm-eval, with a copy of its tokenizer, because lm-eval adds a padding token."""
    from lm_eval.models.huggingface import HFLM

    class Scored(HFLM):  # type: ignore[misc]
        """Scorer of answers by ``score_reads``: only their own tokens are projected to the vocabulary.

        Ranks are ours, and exchange what lm-eval has them exchange.
        """

        finite = True

        @property
        def rank(self) -> int:
            return ranks.rank() if self.world_size > 1 else 0  # in lockstep each rank scores all items

        @property
        def world_size(self) -> int:
            return ranks.world_size()

        def all_gather(self, tensor: Tensor) -> Tensor:
            return torch.stack(self.gather_object(tensor))

        def gather_object(self, obj: Any, dst: int = 0) -> list[Any]:
            return ranks.spread(range(self.world_size), lambda _: obj)

        def barrier(self) -> None:
            ranks.barrier("lm-eval")

        def _loglikelihood_tokens(
            self, requests: list[tuple[Any, list[int], list[int]]], **_: object
        ) -> list[tuple[float, bool]]:
            texts = [(*context, *answer)[-self.max_length - 1 :] for _, context, answer in requests]
            widths = [len(answer) for _, _, answer in requests]
            pairs = zip(texts, widths, strict=True)
            reads = [[(ids[:at], ids[at]) for at in range(len(ids) - width, len(ids))] for ids, width in pairs]
            means, right = score_reads(lm, reads, max_bytes=max_bytes)
            self.finite = self.finite and bool(means.isfinite().all())
            return list(zip((means * torch.tensor(widths)).tolist(), (right == 1).tolist(), strict=True))

    return Scored(pretrained=lm.model, tokenizer=copy.deepcopy(lm.tokenizer), batch_size=8)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress lm-eval's bars, prints and warnings, and restore the random number generators."""
    logger, sink = logging.getLogger("lm_eval"), io.StringIO()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with isolate_rng(), redirect_stdout(sink), redirect_stderr(sink):
            yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True)
class Agreement:
    """A metric of the confusion matrix, as lm-eval's aggregation.

    Args:
        measure: Function from confusion matrices (... x c labels x c answers) to ... numbers.
    """

    measure: Callable[[Counts], Numbers]

    def __call__(self, pairs: Sequence[tuple[int, int]]) -> float:
        """Compute the metric of (label, answer) pairs."""
        return float(self.measure(_table(pairs)))

    def error(self, pairs: Sequence[tuple[int, int]]) -> float:
        """Estimate the standard error; a bootstrap sample of items is a multinomial draw of the matrix."""
        table = _table(pairs)
        draws = np.random.default_rng(0).multinomial(len(pairs), table.ravel() / len(pairs), size=DRAWS)
        return float(self.measure(draws.reshape(DRAWS, *table.shape)).std(ddof=1))


def _table(pairs: Sequence[tuple[int, int]]) -> Counts:
    table = np.zeros((1 + max(map(max, pairs)),) * 2, dtype=np.int64)
    np.add.at(table, tuple(np.array(pairs).T), 1)
    return table


def weighted_f1(table: Counts) -> Numbers:
    """Compute the mean F1 over classes, weighted by their items.

    Example:
        >>> weighted_f1(np.array([[3, 1], [2, 2]])).round(4).item()
        0.619
    """
    labels, answers = table.sum(-1), table.sum(-2)
    f1 = 2 * np.diagonal(table, axis1=-2, axis2=-1) / np.maximum(labels + answers, 1)
    return np.asarray((f1 * labels).sum(-1) / labels.sum(-1))


def matthews(table: Counts) -> Numbers:
    """Compute Matthews' correlation coefficient, for any number of classes; 0 where all answers are the same.

    Example:
        >>> matthews(np.array([[3, 1], [2, 2]])).round(4).item()
        0.2582
    """
    labels, answers, items = table.sum(-1), table.sum(-2), table.sum((-2, -1))
    agreed = items * np.trace(table, axis1=-2, axis2=-1) - (labels * answers).sum(-1)
    spread = (items**2 - (labels**2).sum(-1)) * (items**2 - (answers**2).sum(-1))
    return np.asarray(agreed / np.sqrt(np.maximum(spread, 1)))


METRICS = {"acc": "mean", "f1": Agreement(weighted_f1), "mcc": Agreement(matthews)}
"""Metrics of the local tasks, each with lm-eval's aggregation over the items."""
