"""Runs side by side."""

from __future__ import annotations

import csv
import io
import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from cakeflow.errors import visible
from cakeflow.export.card import escape
from cakeflow.forward.packing import GIB
from cakeflow.report.folder import RunFolder
from cakeflow.report.intervals import Interval, estimate, number, paired
from cakeflow.report.views import method, peak_memory, run_changes, seconds_per_edit

DELTA = "\N{GREEK CAPITAL LETTER DELTA} "
"""Prefix of a metric's name for its difference from the first run."""
FORMULA_SIGNS = tuple("=+-@")
"""Signs, also of full width, with which a cell begins that a spreadsheet calculates."""


def compare_runs(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """Return one row per run: model, method, edits, metrics after editing, time and memory.

    Returns:
        Text and numbers, nan where a run has none. Every metric of any run is an ``Interval``; under ``DELTA`` and its
        name stands the difference from the first run, paired by record, if both have the same records.
    """
    after = [
        {name: change.after for name, change in run_changes(run).items()} | differences(runs[0], run) for run in runs
    ]
    names = dict.fromkeys(name for metrics in after for name in metrics)
    return [
        {
            "run": str(run.path),
            "model": run.info.model.source,
            "method": method(run),
            "edits": run.size,
            "protocol": run.info.protocol,
            **{name: metrics.get(name, Interval(math.nan)) for name in names},
            "seconds per edit": seconds_per_edit(run),
            "peak GiB": peak_memory(run) / GIB,
        }
        for run, metrics in zip(runs, after, strict=True)
    ]


def differences(first: RunFolder, run: RunFolder) -> dict[str, Interval]:
    """Return a run's differences from the first, paired by record; empty if the runs cannot be compared."""
    if run is first or run.info.protocol != first.info.protocol:
        return {}
    changes = paired(first.after or (), run.after or ())
    return {DELTA + name: value for name, value in changes.items() if not math.isnan(value.mean)}


def as_texts(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return per field of the rows one text for each run."""
    return {name: [_text(name, row[name]) for row in rows] for name in rows[0]}


def to_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the runs side by side as a Markdown table."""
    lines = [list(map(escape, [name, *texts])) for name, texts in as_texts(rows).items()]
    lines.insert(1, ["---"] * (len(rows) + 1))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return CSV with a line per run; an interval becomes its mean and 95 % bounds, nan an empty cell.

    A text that a spreadsheet would take for a formula has an apostrophe in front.
    """
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
    cells: dict[str, Any] = {}
    for label, value in row.items():
        name = label.replace(DELTA, "delta_")
        if isinstance(value, Interval):
            cells |= {name: value.mean, f"{name}_low": value.low, f"{name}_high": value.high}
        else:
            cells[name.replace(" ", "_")] = value
    return {_safe(name): "" if value != value else _safe(value) for name, value in cells.items()}


def _safe(value: Any) -> Any:
    """Return a text that no spreadsheet calculates, and a number as it is."""
    if not isinstance(value, str):
        return value
    first = unicodedata.normalize("NFKC", value).lstrip()[:1]
    return f"'{visible(value)}" if first in FORMULA_SIGNS else visible(value)
