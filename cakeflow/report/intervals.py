"""Metrics per record, and 95 % intervals of their mean over records."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from cakeflow.data.public_files import TOPICS
from cakeflow.evaluation.outcome import METRICS
from cakeflow.journal.schema import EvaluatedRequest

Values = NDArray[np.float64]
Z = 1.959963984540054
"""Half the width of a 95 % interval, in standard errors."""
FEWEST = 20
"""Records that a bootstrap needs: with 12 its 95 % interval may cover no more than 83 %, from 20 on 90 to 99 %."""
RESAMPLES = 1999
"""Samples that a bootstrap draws."""
KINDS = {"efficacy": "rewrite", "generalization": "paraphrase", "specificity": "neighborhood"}
"""Metric -> kind of prompt."""
FORMS = {
    "": "success",
    "_exact": "correct",
    "_tokens": "tokens",
    "_answer": "answered",
    "_contained": "contained",
    "_judged": "judged",
}
"""Ending of a metric's name -> field of ``PromptAnswer`` (see ``cakeflow.metrics.preference``)."""
ALONG = (
    *(f"knowledge/{name}" for name in ("old", "new", "uncertain", "negated", "masked", "restored")),
    *(f"knowledge/{name}" for name in ("reversed", "reversed_answer")),
    *(f"context/{name}" for name in ("alone", "chat", "turns", "system")),
    *(f"{name}/top{k}" for name in ("neighbors", "neutral") for k in (1, 5, 10)),
    *(f"consequences/{topic}" for topic in (*sorted(set(TOPICS.values())), "multi_hop")),
)
"""Shares that callbacks log."""
IMAGES = ("sr", "gr", "gr_official", "lr", "lr_sensitive", "mirror", "worst_group")
"""Metrics of runs of images."""
WORDS = {f"{name}{form}" for name in (*KINDS, "editscore") for form in FORMS}
"""Metrics of prompts, which mean nothing for pictures."""
SHARES = WORDS | {*METRICS.values(), *ALONG, *IMAGES}
"""Metrics that are shares; so are those behind any length of other text (``is_share``). Plugins' may have any unit."""
UNKNOWN, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


def is_share(metric: str) -> bool:
    """Return whether a metric is a share, which is printed in percent.

    Example:
        >>> is_share("efficacy"), is_share("context/text_100"), is_share("neutral/kl")
        (True, True, False)
    """
    return metric in SHARES or bool(re.fullmatch(r"context/(text|chat)_\d+", metric))


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval, whose bounds are nan where no record could be judged."""

    mean: float
    low: float = math.nan
    high: float = math.nan

    @classmethod
    def of(cls, values: Values, least: float = 0.0) -> Interval:
        """Return the mean over the records that are not nan, with its interval.

        A share of records has Wilson's interval. Means of several prompts and differences have a bootstrap over records
        (BCa). Where there are too few records for that, or all of them agree, shares have Wilson's interval as well,
        and differences that of Bonett and Price: records agree by chance too, so that no interval has the width 0.

        Args:
            values: One per record.
            least: Least value that a record can have: 0 for a share, -1 for a difference of shares.

        Example:
            >>> Interval.of(np.array([1.0, 0.0, np.nan, 1.0, 0.0]))
            Interval(mean=0.5, low=0.150..., high=0.849...)
        """
        values = values[~np.isnan(values)]
        if not len(values):
            return cls(math.nan)
        mean = float(values.mean())
        if len(values) < FEWEST or np.ptp(values) < 1e-9 or (not least and np.isin(values, (0, 1)).all()):
            low, high = _with_two_more(values) if least else _wilson(mean, len(values))
        else:
            low, high = _bootstrap(values)
        return cls(mean, max(least, min(low, mean)), min(1.0, max(high, mean)))


def _wilson(share: float, count: int) -> tuple[float, float]:
    """Return Wilson's score interval; scipy's takes whole numbers of successes only."""
    center = share + Z**2 / (2 * count)
    half = Z * math.sqrt(share * (1 - share) / count + (Z / (2 * count)) ** 2)
    return (center - half) / (1 + Z**2 / count), (center + half) / (1 + Z**2 / count)


def _with_two_more(values: Values) -> tuple[float, float]:
    """Return the normal interval as if one more record had gained all and one had lost all (Bonett and Price, 2012)."""
    more = np.append(values, (-1, 1))
    half = Z * more.std() / math.sqrt(len(more))
    return more.mean() - half, more.mean() + half


def _bootstrap(values: Values) -> tuple[float, float]:
    """Return the BCa interval of the mean from samples of the records; the same for the same records."""
    bounds = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, 2**21 // len(values)),  # 16 MiB at a time
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(bounds.low), float(bounds.high)


def record_values(records: Sequence[EvaluatedRequest], forms: Mapping[str, str] = FORMS) -> dict[str, Values]:
    """Return per metric the value of every record, nan where it cannot be judged.

    A record's value is the mean over its prompts of the metric's kind; ``editscore`` is ``harmonic`` of the three
    others.

    Args:
        records: The answers, request by request.
        forms: Those of ``FORMS`` that are needed.
    """
    values = {}
    for form, field in forms.items():
        for metric, kind in KINDS.items():
            means = (_value(record, kind, field) for record in records)
            values[metric + form] = np.fromiter(means, np.float64, len(records))
        if not form:
            values["editscore"] = harmonic([values[metric] for metric in KINDS])
    return values


def paired(
    first: Sequence[EvaluatedRequest], second: Sequence[EvaluatedRequest], forms: Mapping[str, str] = FORMS
) -> dict[str, Interval]:
    """Return per metric the mean difference of the second side from the first, paired by record.

    Empty if the records differ, or what was asked about them.
    """
    if [*map(_asked, first)] != [*map(_asked, second)]:
        return {}
    before, after = record_values(first, forms), record_values(second, forms)
    return {name: Interval.of(after[name] - before[name], least=-1.0) for name in after}


def _asked(record: EvaluatedRequest) -> tuple[object, ...]:
    return record.index, record.key, [(each.kind, each.prompt, each.expected, each.rival) for each in record.prompts]


def _value(record: EvaluatedRequest, kind: str, field: str) -> float:
    outcomes = (getattr(prompt, field) for prompt in record.of_kind(kind))
    return _mean([outcome for outcome in outcomes if outcome is not None])


def _mean(values: Collection[float] | Values) -> float:
    return float(sum(values) / len(values)) if len(values) else math.nan


def harmonic(parts: Sequence[Values]) -> Values:
    """Return per-record values whose mean is the harmonic mean of the parts' means, with its spread (delta method).

    ``S = k / sum_j 1/m_j`` has ``dS/dm_j = S^2 / (k m_j^2)``; record i of N moves ``m_j`` by ``(x_ij - m_j) / n_j``.

    Returns:
        One value per record; all nan if a part could not be judged, all 0 if a part's mean is 0.
    """
    means = np.array([_mean(part[~np.isnan(part)]) for part in parts])
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
    """Format a metric with its 95 % interval, in percent if it is a share.

    Example:
        >>> estimate("efficacy", Interval(0.975, 0.871, 0.996)), estimate("efficacy", Interval(0.1), "+")
        ('97.5 [87.1, 99.6]', '+10.0')
    """
    scale, spec = (100, ".1f") if is_share(name) else (1, ".4g")
    mean, low, high = (number(scale * each, sign + spec) for each in (interval.mean, interval.low, interval.high))
    return mean if math.isnan(interval.low) else f"{mean} [{low}, {high}]"
