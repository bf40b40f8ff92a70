"""Metrics per record, and 95 % intervals of their mean from the standard error over records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cakeflow.journal.schema import EvaluatedRequest

Values = NDArray[np.float64]
Z = 1.959963984540054
"""Half the width of a 95 % interval, in standard errors."""
KINDS = {"efficacy": "rewrite", "generalization": "paraphrase", "specificity": "neighborhood"}
"""Metric -> kind of prompt."""
FORMS = {"": "success", "_exact": "correct", "_tokens": "tokens", "_answer": "answered"}
"""Ending of a metric's name -> field of ``PromptAnswer`` (see ``cakeflow.metrics.preference``)."""
SHARES = {f"{name}{form}" for name in (*KINDS, "editscore") for form in FORMS}
"""Metrics that are shares, printed in percent; those of plugins may have any unit."""
UNKNOWN, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its 95 % interval; nan where fewer than two records could be judged."""

    mean: float
    half: float = math.nan

    @classmethod
    def of(cls, values: Values) -> Interval:
        """Return the mean over the records that are not nan, with its interval.

        Example:
            >>> Interval.of(np.array([1.0, 0.0, np.nan, 1.0, 0.0]))
            Interval(mean=0.5, half=0.565...)
        """
        values = values[~np.isnan(values)]
        if not len(values):
            return cls(math.nan)
        half = Z * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(float(values.mean()), float(half))


def record_values(records: Sequence[EvaluatedRequest]) -> dict[str, Values]:
    """Return per metric the value of every record, nan where it cannot be judged.

    A record's value is the mean over its prompts of the metric's kind; ``editscore`` is ``harmonic`` of the three
    others.
    """
    values = {}
    for form, field in FORMS.items():
        for metric, kind in KINDS.items():
            means = (_mean(record, kind, field) for record in records)
            values[metric + form] = np.fromiter(means, np.float64, len(records))
        if not form:
            values["editscore"] = harmonic([values[metric] for metric in KINDS])
    return values


def paired(first: Sequence[EvaluatedRequest], second: Sequence[EvaluatedRequest]) -> dict[str, Interval]:
    """Return per metric the mean difference of the second side from the first, paired by record.

    Empty if the records differ.
    """
    if [(record.index, record.key) for record in first] != [(record.index, record.key) for record in second]:
        return {}
    before, after = record_values(first), record_values(second)
    return {name: Interval.of(after[name] - before[name]) for name in after}


def _mean(record: EvaluatedRequest, kind: str, field: str) -> float:
    outcomes = (getattr(prompt, field) for prompt in record.of_kind(kind))
    judged = [outcome for outcome in outcomes if outcome is not None]
    return sum(judged) / len(judged) if judged else math.nan


def harmonic(parts: Sequence[Values]) -> Values:
    """Return per-record values whose mean is the harmonic mean of the parts' means, with its spread (delta method).

    ``S = k / sum_j 1/m_j`` has ``dS/dm_j = S^2 / (k m_j^2)``; record i of N moves ``m_j`` by ``(x_ij - m_j) / n_j``.

    Returns:
        One value per record; all nan if a part could not be judged, all 0 if a part's mean is 0.
    """
    means = np.array([Interval.of(part).mean for part in parts])
    size = len(parts[0])
    if np.isnan(means).any() or not means.all():
        return np.full(size, means.prod())
    score = len(parts) / (1 / means).sum()
    values = np.full(size, score)
    for part, mean in zip(parts, means, strict=True):
        judged = ~np.isnan(part)
        values[judged] += score**2 / (len(parts) * mean**2) * (part[judged] - mean) * size / judged.sum()
    return values


def number(value: float | None, spec: str = ".4g") -> str:
    """Format a number, with a dash for None and nan.

    Example:
        >>> number(0.000123456), number(2, "+.1f"), number(float("nan")) == UNKNOWN
        ('0.0001235', '+2.0', True)
    """
    return UNKNOWN if value is None or value != value else format(value, spec).replace("-", MINUS)


def estimate(name: str, interval: Interval, sign: str = "") -> str:
    """Format a metric with half the width of its interval, in percent if it is a share.

    Example:
        >>> estimate("efficacy", Interval(0.975, 0.0484)), estimate("efficacy", Interval(0.1), "+")
        ('97.5 ± 4.8', '+10.0')
    """
    scale, spec = (100, ".1f") if name in SHARES else (1, ".4g")
    mean = number(scale * interval.mean, sign + spec)
    return mean if interval.half != interval.half else f"{mean} ± {number(scale * interval.half, spec)}"
