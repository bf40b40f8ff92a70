"""Runs side by side."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from cakeflow.forward.packing import GIB
from cakeflow.report.folder import RunFolder
from cakeflow.report.intervals import Interval, estimate, number, paired
from cakeflow.report.views import method, peak_memory, run_changes, seconds_per_edit

DELTA = "\N{GREEK CAPITAL LETTER DELTA} "
"""Before the name of a metric: its difference from the first run."""


def compare_runs(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """One row per run: what it was, what it took, and its metrics after editing.

    Returns:
        Text, numbers (nan where the run does not tell), per metric that any run has an ``Interval`` and, under its name
        after a delta, the difference from the first run: paired by record, where both have the same ones.
    """
    after = [
        {name: change.after for name, change in run_changes(run).items()} | differences(runs[0], run) for run in runs
    ]
    names = dict.fromkeys(name for metrics in after for name in metrics)
    return [
        {
            "run": str(run.path),
            "model": str(run.info["model"].get("source", "?")),
            "method": method(run),
            "edits": run.size,
            "protocol": run.info.get("protocol", "?"),
            **{name: metrics.get(name, Interval(math.nan)) for name in names},
            "seconds per edit": seconds_per_edit(run),
            "peak GiB": peak_memory(run) / GIB,
        }
        for run, metrics in zip(runs, after, strict=True)
    ]


def differences(first: RunFolder, run: RunFolder) -> dict[str, Interval]:
    """Delta and metric -> difference of a run from the first, paired by record; nothing if they cannot be compared."""
    if run is first or run.info.get("protocol") != first.info.get("protocol"):
        return {}
    found = paired(first.after or (), run.after or ())
    return {DELTA + name: value for name, value in found.items() if not math.isnan(value.mean)}


def shown(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """What a row holds -> one text per run."""
    return {name: [_text(name, row[name]) for row in rows] for name in rows[0]}


def to_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The runs side by side as a Markdown table."""
    lines = [[name, *(text.replace("|", "\\|") for text in texts)] for name, texts in shown(rows).items()]
    lines.insert(1, ["---"] * (len(rows) + 1))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per run; an interval becomes its mean and its 95 % bounds, and what is not known stays empty."""
    flat = [_flat(row) for row in rows]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return buffer.getvalue()


def _text(name: str, value: Any) -> str:
    if isinstance(value, Interval):
        return estimate(name.removeprefix(DELTA), value, "+" if name.startswith(DELTA) else "")
    return number(value, ".3f") if isinstance(value, float) else str(value)


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for label, value in row.items():
        name = label.replace(DELTA, "delta_")
        if isinstance(value, Interval):
            found |= {name: value.mean, f"{name}_low": value.mean - value.half, f"{name}_high": value.mean + value.half}
        else:
            found[name.replace(" ", "_")] = value
    return {name: "" if value != value else value for name, value in found.items()}
