"""Numbers as people read them."""

from __future__ import annotations

from cakeflow.report.intervals import KINDS, Interval

SHARES = {f"{name}{form}" for name in (*KINDS, "editscore") for form in ("", "_exact")}
"""Metrics that are shares, shown in percent; those of plugins may be anything."""
UNKNOWN, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


def number(value: float | None, spec: str = ".4g") -> str:
    """A number, or a dash for none.

    Example:
        >>> number(0.000123456), number(2, "+.1f"), number(float("nan")) == UNKNOWN
        ('0.0001235', '+2.0', True)
    """
    return UNKNOWN if value is None or value != value else format(value, spec).replace("-", MINUS)


def estimate(name: str, interval: Interval, sign: str = "") -> str:
    """A metric with half the width of its interval, in percent if it is a share.

    Example:
        >>> estimate("efficacy", Interval(0.975, 0.0484)), estimate("efficacy", Interval(0.1), "+")
        ('97.5 ± 4.8', '+10.0')
    """
    scale, spec = (100, ".1f") if name in SHARES else (1, ".4g")
    mean = number(scale * interval.mean, sign + spec)
    return mean if interval.half != interval.half else f"{mean} ± {number(scale * interval.half, spec)}"
