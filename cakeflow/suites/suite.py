"""A suite of measurements as data: which methods edit which facts of one model, and what is measured."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from pydantic import Field

from cakeflow.callbacks.outcome import OutcomeCheck
from cakeflow.callbacks.periodic import PeriodicCallback
from cakeflow.core.config import (
    build_callbacks,
    build_module,
    configs_of,
    find_config,
    load_with,
    model_kind,
    read_config,
    shipped,
)
from cakeflow.core.datamodule import EditDataModule
from cakeflow.core.module import EditModule
from cakeflow.data.review import check_fields
from cakeflow.editor import with_checks
from cakeflow.errors import ConfigError, did_you_mean, listed, require_count
from cakeflow.evaluation.outcome import METRICS
from cakeflow.models.loading import Loading
from cakeflow.storage.cache import content_key
from cakeflow.storage.folders import file_name
from cakeflow.storage.typed import Count, Json, Schema, read_as

Part = dict[str, Json]
"""A part of a suite that is arguments of one of our classes."""
REMEDY = "correct it; cakeflow/suites/suite.py says what a suite has, configs/suite has examples"


class Suite(Schema):
    """A suite, as its YAML file has it.

    Attributes:
        model: An embedded name, a hub id, a folder or a GGUF file.
        config: Tuned numbers for it; by default the shipped config of its name.
        methods: Name of an arm -> arguments over its recipe; the name is the recipe, unless ``method`` is among them. A
            ``batch_size`` among them replaces the suite's.
        baseline: The arm that the others are compared with, record by record.
        data: Name of a data set -> arguments of ``EditDataModule``, and ``callbacks`` for this data set alone.
        sizes: Numbers of facts to edit.
        seeds: Seeds of the shuffles that choose the facts; a data set with ``shuffle_seed: null`` keeps its order.
        batch_size: Facts in a batch; None edits all at once.
        evaluation: Arguments of ``Evaluation``.
        callbacks: Further measurements, a class and its arguments each.
        metrics: Columns of the page, by the names that runs log; what the data cannot feed is an error.
        shape: Config of the model's shape for a plan where the model itself is not there (``model_type`` and so on).
    """

    model: str
    config: str | None = None
    methods: dict[str, Part | None] = Field(min_length=1)
    baseline: str
    data: dict[str, Part] = Field(min_length=1)
    sizes: list[Count] = Field(min_length=1)
    seeds: list[Count] = Field(default=[0], min_length=1)
    batch_size: Count | None = None
    evaluation: Part = Field(default_factory=dict)
    callbacks: list[Part] = Field(default_factory=list)
    metrics: list[str] = Field(min_length=1)
    shape: Part = Field(default_factory=dict)


def read_suite(
    name: str | Path,
    *,
    model: str | None = None,
    config: str | None = None,
    data: Sequence[str] = (),
    methods: Sequence[str] = (),
    sizes: Sequence[int] = (),
    ability: str | None = None,
) -> Suite:
    """Read a shipped suite by name, or a YAML file, with what replaces parts of it.

    Args:
        name: The suite.
        model: Another model.
        config: Tuned numbers for it, by name or as a YAML file.
        data: Files beside the suite's own data sets; each is named by its stem.
        methods: Only these of its arms; the baseline stays.
        sizes: Other numbers of facts.
        ability: Folder of multiple-choice tasks for general ability, ``TASK.jsonl`` each (``ChoiceAbility`` of the
            plugin ``cakeflow_ability``), which become columns.

    Raises:
        ConfigError: If there is no such suite or no task, it is not as ``Suite`` says, or an arm or a data set is named
            wrongly.
    """
    path = find_config("suite", name)
    suite = read_as(Suite, read_config(path), str(path), ConfigError, REMEDY)
    files: dict[str, Part] = {Path(each).name.partition(".")[0] or each: {"source": each} for each in data}
    if len(files) < len(data) or set(files) & set(suite.data):
        names = [*suite.data, *(Path(each).name.partition(".")[0] for each in data)]
        raise ConfigError(f"data sets are named by their files, and these names are not distinct: {listed(names)}")
    for each in (*methods, suite.baseline):
        if each not in suite.methods:
            raise ConfigError(f"suite {path.stem} has no arm {each!r}{did_you_mean(each, suite.methods)}")
    chosen = {each: part for each, part in suite.methods.items() if each in (*(methods or [each]), suite.baseline)}
    changes: dict[str, Any] = {"data": suite.data | files, "methods": chosen}
    changes |= {"model": model, "config": None, "shape": {}} if model else {}
    changes |= ({"config": config} if config else {}) | ({"sizes": [*sizes]} if sizes else {})
    suite = suite.model_copy(update=changes)
    return suite if ability is None else _with_ability(suite, ability)


def _with_ability(suite: Suite, folder: str) -> Suite:
    """Return a suite that measures general ability on the tasks of a folder as well."""
    tasks = sorted(path.stem for path in Path(folder).glob("*.jsonl"))
    if not tasks:
        raise ConfigError(f"--ability {folder}: no task there; give a folder with a TASK.jsonl for each task")
    arguments: dict[str, Json] = {"data": folder, "tasks": [*tasks], "every": None}
    columns = [f"ability/{task}/acc" for task in tasks]
    callback: Part = {"class_path": "ChoiceAbility", "init_args": arguments}
    parts = {"callbacks": [*suite.callbacks, callback], "metrics": [*suite.metrics, *columns]}
    return suite.model_copy(update=parts)


@dataclass(frozen=True)
class Arm:
    """One run of a suite: a method on some facts.

    Attributes:
        suite: The suite.
        method: Name of the arm in ``Suite.methods``.
        data: Name of its data set.
        size: Number of facts.
        seed: Seed of the shuffle that chose them.
        loading: How the model is loaded.
    """

    suite: Suite = field(repr=False)
    method: str
    data: str
    size: int
    seed: int
    loading: Loading = field(default=Loading(), repr=False)

    @property
    def name(self) -> str:
        """The data set, its size and seed, and the method; also the folder of the run below that of the suite."""
        return f"{file_name(self.data)}/{self.size}/seed{self.seed}/{file_name(self.method)}"

    @property
    def overrides(self) -> Part:
        """What the suite says of the method beside its recipe."""
        return self.suite.methods[self.method] or {}

    @property
    def batch_size(self) -> int:
        """Facts in a batch."""
        size: Any = self.overrides.get("batch_size", self.suite.batch_size)
        return self.size if size is None else int(size)

    @cached_property
    def configs(self) -> list[Path]:
        """The recipe, the model's numbers for it where there are some, and a search that the arm names."""
        recipe: Any = self.overrides.get("method", self.method)
        kind, config = model_kind(find_config("method", recipe)), self.suite.config
        fits = kind == "model" or config in shipped(kind)  # the numbers of a model are those of one class
        layers, targets = bool(self.overrides.get("layers")), self.overrides.get("targets")
        return configs_of(recipe, self.suite.model, config if fits else None, layers, targets)

    @property
    def parts(self) -> list[Any]:
        """Everything that names classes."""
        return [*map(read_config, self.configs), self.overrides, self.suite.callbacks, self.suite.data[self.data]]

    def module(self) -> EditModule:
        """Return the edit method, whose model is not loaded yet.

        Raises:
            ConfigError: If an argument does not fit the recipe's class.
        """
        values = {name: each for name, each in self.overrides.items() if name not in ("method", "batch_size")}
        if isinstance(values.get("targets"), str):
            del values["targets"]  # one of the configs
        if taken := sorted({"base", "evaluation"} & set(values)):
            raise ConfigError(f"arm {self.method!r}: {taken[0]} is that of the whole suite; leave it out of the arm")
        values |= {"base": self.suite.model, "evaluation": dict(self.suite.evaluation)}
        try:
            return load_with(build_module(self.configs, **values), self.loading.arguments())
        except ConfigError as error:
            raise ConfigError(f"arm {self.method!r} of the suite: {error}") from error

    @cached_property
    def requests(self) -> EditDataModule:
        """The facts.

        Raises:
            ConfigError: If the data set has fewer of them than the suite asks for.
            RequestError: Listing every bad request.
        """
        values: dict[str, Any] = {"shuffle_seed": self.seed, **self.suite.data[self.data]}
        values.pop("callbacks", None)
        try:
            data = EditDataModule(**values, limit=self.size, batch_size=self.batch_size)
        except TypeError as error:
            raise ConfigError(
                f"data set {self.data!r} of the suite: {error}; give arguments of EditDataModule"
            ) from error
        if len(data.requests) < self.size:
            raise ConfigError(
                f"data set {self.data!r} has {len(data.requests)} facts that can be edited together, and {self.size} "
                "are to be; give a smaller size, --sizes"
            )
        return data

    def callbacks(self) -> list[Callback]:
        """Return new callbacks: those of suite and data set, and those that every run has."""
        further: Any = self.suite.data[self.data].get("callbacks", [])
        parts = [*self.suite.callbacks, *further]
        callbacks = build_callbacks(parts)
        for part, callback in zip(parts, callbacks, strict=True):
            if isinstance(callback, PeriodicCallback):
                callback.identity = content_key(part)
        return with_checks(callbacks)


def arms_of(suite: Suite, loading: Loading = Loading()) -> list[Arm]:
    """Return the arms of a suite, data set by data set, the baseline first in each.

    Everything that can be checked without a model is checked: recipes, arguments, facts, and fields that metrics need.

    Args:
        suite: The suite.
        loading: How the model is loaded.

    Raises:
        ConfigError: Naming what is wrong, and where.
        RequestError: Listing every bad request of a data set.
    """
    for size in suite.sizes:
        require_count("sizes", size, 1)
    seeds = [*dict.fromkeys(suite.seeds)]
    names = [suite.baseline, *(each for each in suite.methods if each != suite.baseline)]
    arms = [
        Arm(suite, method, data, size, seed, loading)
        for data in suite.data
        for size in dict.fromkeys(suite.sizes)
        for seed in (seeds[:1] if "shuffle_seed" in suite.data[data] else seeds)  # facts of another order have no seed
        for method in names
    ]
    for each in (suite.data, suite.methods):
        if len({file_name(name).casefold() for name in each}) < len(each):
            raise ConfigError(f"of {listed([*each])} some would have one folder on some systems; choose other names")
    modules = {arm.method: arm.module() for arm in arms[: len(names)]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each arm says its doubts when it runs
        for arm in arms:
            if arm.method == suite.baseline:
                _check_metrics(arm, modules[arm.method])
    return arms


def _check_metrics(arm: Arm, module: EditModule) -> None:
    """Require that each column is a metric of a run, and that the facts have the fields that it needs."""
    needs = {name: tuple(getattr(metric, "needs", ())) for name, metric in module.metrics.items()}
    callbacks = arm.callbacks()
    needs |= {name: () for name in METRICS.values() if any(isinstance(each, OutcomeCheck) for each in callbacks)}
    periodic = {each.name: each for each in callbacks if isinstance(each, PeriodicCallback)}
    for column in arm.suite.metrics:
        name, _, number = column.partition("/")
        if number and name in periodic:
            needs[column] = tuple(periodic[name].needs.get(number, ()))
        if column not in needs:
            prefixes = [f"{each}/..." for each in periodic]
            raise ConfigError(
                f"metrics of the suite: nothing measures {column!r}{did_you_mean(column, needs)}; there are "
                f"{', '.join([*needs, *prefixes])}"
            )
    try:
        check_fields(arm.requests.requests, {each: needs[each] for each in arm.suite.metrics}, arm.suite.metrics)
    except ConfigError as error:
        raise ConfigError(f"data set {arm.data!r}: {error}") from error


def by_cell(arms: Sequence[Arm]) -> Iterator[tuple[str, int, Mapping[str, list[Arm]]]]:
    """Yield data set, size, and for each method its arms, one for each seed."""
    for data, size in dict.fromkeys((arm.data, arm.size) for arm in arms):
        methods: dict[str, list[Arm]] = {}
        for arm in arms:
            if (arm.data, arm.size) == (data, size):
                methods.setdefault(arm.method, []).append(arm)
        yield data, size, methods
