"""Numbers of a suite's page: each arm's metrics with intervals, and its differences from the baseline by record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cakeflow.data.text import states
from cakeflow.evaluation.outcome import by_metric
from cakeflow.report.folder import RunFolder
from cakeflow.report.intervals import Interval, Values, estimate, record_values
from cakeflow.suites.rows import RUNS, Row
from cakeflow.suites.suite import Arm, by_cell

Key = tuple[object, ...]
"""The questions that values are about."""


@dataclass(frozen=True)
class Line:
    """One method on one data set and size, over all seeds.

    Attributes:
        method: Name of the arm.
        rows: Its rows, one for each seed.
        metrics: Metric -> mean over the records of all seeds with its 95 % interval; of a number that no record has,
            the mean over seeds without interval; nan where it was not measured.
        differences: Metric -> difference from the baseline, paired by record; nan where the protocol or the records
            differ, and for the baseline itself.
    """

    method: str
    rows: Sequence[Row]
    metrics: Mapping[str, Interval]
    differences: Mapping[str, Interval]

    @property
    def faults(self) -> list[str]:
        """Errors that ended runs of this method."""
        return [row.fault for row in self.rows if row.fault]

    @property
    def protocol(self) -> str:
        """Protocol of its metrics; empty if no run ended well."""
        return next((row.protocol for row in self.rows if row.protocol), "")

    def mean(self, name: str) -> float:
        """Return the mean over seeds of a number of ``Row``, such as ``seconds``."""
        return float(np.mean([getattr(row, name) for row in self.rows]))

    @property
    def verdict(self) -> str:
        """Where it is better or worse than the baseline beyond the interval of the paired difference, in words."""
        parts = []
        better = {name: each for name, each in self.differences.items() if each.low > 0}
        worse = {name: each for name, each in self.differences.items() if each.high < 0}
        for word, beyond in (("better", better), ("worse", worse)):
            names = [f"{name} {estimate(name, each, '+')}" for name, each in beyond.items()]
            parts += [f"{word}: {', '.join(names)}"] if names else []
        compared = any(not math.isnan(each.low) for each in self.differences.values())
        return "; ".join(parts) or ("no difference beyond the intervals" if compared else "")


@dataclass(frozen=True)
class Table:
    """All methods of a suite on one data set and size.

    Attributes:
        data: Name of the data set.
        size: Number of facts.
        lines: The methods, the baseline first.
    """

    data: str
    size: int
    lines: Sequence[Line]


def grouped(columns: Sequence[str]) -> dict[str, list[str]]:
    """Return columns by the callback that logs them; those of every run are ``facts``.

    Example:
        >>> grouped(["efficacy", "knowledge/new", "learned"])
        {'facts': ['efficacy', 'learned'], 'knowledge': ['knowledge/new']}
    """
    groups: dict[str, list[str]] = {}
    for name in columns:
        prefix, slash, _ = name.partition("/")
        groups.setdefault(prefix if slash else "facts", []).append(name)
    return groups


def tables_of(arms: Sequence[Arm], rows: Sequence[Row], folder: Path) -> list[Table]:
    """Return the tables of a suite.

    Args:
        arms: The arms, the baseline first on each data set.
        rows: Their rows.
        folder: The folder of the suite.

    Raises:
        RunFolderError: If the folder of a run is missing or damaged.
    """
    by_name = {row.arm: row for row in rows}
    tables = []
    for data, size, methods in by_cell(arms):
        first: _Values | None = None
        lines: list[Line] = []
        for method, parts in methods.items():
            own = [by_name[arm.name] for arm in parts]
            values = _Values.of([RunFolder.read(folder / RUNS / row.arm) for row in own if not row.fault])
            columns = parts[0].suite.metrics
            lines.append(_line(method, own, values, columns, lines[0] if lines else None, first))
            first = first or values
        tables.append(Table(data, size, lines))
    return tables


@dataclass(frozen=True)
class _Values:
    """Metric -> value of every record or question, and metric -> what these are about."""

    values: dict[str, Values]
    about: dict[str, Key]

    @classmethod
    def of(cls, runs: Sequence[RunFolder]) -> _Values:
        records = [record for run in runs for record in run.after or ()]
        values, about = record_values(records), tuple((each.index, *each.key) for each in records)
        keys: dict[str, Key] = dict.fromkeys(values, about)
        for name, answers in by_metric([each for run in runs for each in run.answers]).items():
            values[name] = np.array([float(states(each.after or "", each.expected)) for each in answers])
            keys[name] = tuple((each.form, each.prompt, each.expected) for each in answers)
        return cls({name: each for name, each in values.items() if len(each) and not np.isnan(each).all()}, keys)


def _line(
    method: str, rows: list[Row], values: _Values, columns: Sequence[str], base: Line | None, first: _Values | None
) -> Line:
    """One method's metrics; where there is a baseline, differences from it too."""
    whole = [row for row in rows if not row.fault]
    metrics, differences = {}, {}
    for name in columns:
        numbers = [row.metrics.get(name, math.nan) for row in whole]
        plain = Interval(float(np.mean(numbers)) if numbers else math.nan)
        metrics[name] = Interval.of(values.values[name]) if name in values.values else plain
        differences[name] = Interval(math.nan)
        if base is None or first is None or base.protocol != next((row.protocol for row in whole), ""):
            continue
        if name not in values.values:
            if [bool(row.fault) for row in rows] != [bool(row.fault) for row in base.rows]:
                continue  # means over other seeds
            differences[name] = Interval(plain.mean - base.metrics[name].mean)
        elif name in first.values and values.about[name] == first.about[name]:
            differences[name] = Interval.of(values.values[name] - first.values[name], least=-1.0)
    return Line(method, rows, metrics, differences)
