"""Runs side by side: a table of them, what they differ in, and plots."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import PurePath
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from cakeflow.errors import visible
from cakeflow.export.card import markdown_table
from cakeflow.forward.packing import GIB
from cakeflow.report.figures import FILE_STYLE, Curves, curves_of, plot_curves, plot_intervals
from cakeflow.report.folder import RunFolder
from cakeflow.report.intervals import UNKNOWN, Interval, estimate, is_share, number, paired
from cakeflow.report.views import method, peak_memory, run_changes, seconds_per_edit

DELTA = "\N{GREEK CAPITAL LETTER DELTA} "
"""Prefix of a metric's name for its difference from the first run."""
FORMULA_SIGNS = tuple("=+-@")
"""Signs, also of full width, with which a cell begins that a spreadsheet calculates."""
LONGEST = 120
"""Longest text of a setting in a table; of a longer one stand the beginning and a hash."""


def compare_runs(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """Return one row per run: model, method, edits, metrics after editing, time and memory, and what differs.

    Returns:
        Text and numbers, nan where a run has none. Every metric of any run is an ``Interval``; under ``DELTA`` and its
        name stands the difference from the first run, paired by record, if both have the same records. If batches of
        any run were taken back, ``taken back`` says which. Last come settings, ``differing``.
    """
    after = [
        {name: change.after for name, change in run_changes(run).items()} | differences(runs[0], run) for run in runs
    ]
    names = dict.fromkeys(name for metrics in after for name in metrics)
    rollbacks = [_rollbacks(run) for run in runs]
    return [
        {
            "run": str(run.path),
            "model": run.info.model.source,
            "method": method(run),
            "edits": run.size,
            "protocol": run.info.protocol,
            **({"taken back": taken_back} if any(rollbacks) else {}),
            **{name: metrics.get(name, Interval(math.nan)) for name in names},
            "seconds per edit": seconds_per_edit(run),
            "peak GiB": peak_memory(run) / GIB,
            **settings,
        }
        for run, metrics, taken_back, settings in zip(runs, after, rollbacks, differing(runs), strict=True)
    ]


def _rollbacks(run: RunFolder) -> str:
    before = " (the metrics were measured before that)" if run.outdated else ""
    return "; ".join(map(str, run.rollbacks)) + before


def differing(runs: Sequence[RunFolder]) -> list[dict[str, str]]:
    """Return for each run, as text, what the runs differ in: model, settings, data, batch size and versions.

    A setting that only some of them have, because their methods are of other classes, counts if these differ in it.
    """
    columns = [{name: _short(value) for name, value in _settings(run).items()} for run in runs]
    names = dict.fromkeys(chain.from_iterable(columns))
    different = []
    for name in names:
        values = {column.get(name) for column in columns if name in column or not name.startswith("settings.")}
        different += [name] if len(values) > 1 else []
    versions = [run.info.versions for run in runs]
    packages = [
        package
        for package in dict.fromkeys(chain.from_iterable(versions))
        if len({each.get(package) for each in versions}) > 1
    ]
    rows = [{name: column.get(name, UNKNOWN) for name in different} for column in columns]
    for row, each in zip(rows, versions, strict=True):
        if packages:
            row["versions"] = ", ".join(f"{package} {each.get(package, UNKNOWN)}" for package in packages)
    return rows


def _settings(run: RunFolder) -> dict[str, Any]:
    """Return everything that was chosen for a run, by names that say where it stands."""
    model = {f"model.{name}": value for name, value in run.info.model.to_dict().items() if name != "source"}
    start = {"data (SHA-256)": run.start.data, "batch size": run.start.batch_size} if run.start else {}
    return {**model, **{f"settings.{name}": value for name, value in run.info.settings.items()}, **start}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST // 2]} ... ({hashlib.sha256(text.encode(errors='replace')).hexdigest()[:8]})"


def short_names(paths: Sequence[str]) -> list[str]:
    """Return the ends of some paths, as long as it takes to tell them apart.

    Example:
        >>> short_names(["runs/a/cake", "runs/b/cake"]), short_names(["runs/memit", "runs/cake"])
        (['a/cake', 'b/cake'], ['memit', 'cake'])
    """
    parts = [PurePath(path).parts for path in paths]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = [str(PurePath(*each[-length:])) for each in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def plot_runs(runs: Sequence[RunFolder]) -> Axes:
    """Draw runs side by side: metrics after editing with their intervals, and below them what was logged along edits.

    Returns:
        The axes of the metrics; the other plots are in the same figure.
    """
    labels = short_names([str(run.path) for run in runs])
    metrics = {
        label: {name: change.after for name, change in run_changes(run).items() if is_share(name)}
        for label, run in zip(labels, runs, strict=True)
    }
    curves = _curves(dict(zip(labels, runs, strict=True)))
    with plt.rc_context(FILE_STYLE):  # type: ignore[arg-type]
        height = 1.5 + 0.12 * (1 + len(runs)) * len(dict.fromkeys(chain.from_iterable(metrics.values())))
        figure = plt.figure(figsize=(7, height + 3 * len(curves)), layout="constrained")
        axes = figure.subplots(1 + len(curves), height_ratios=[height] + [3] * len(curves), squeeze=False)
        first, *others = axes[:, 0]
        plot_intervals(metrics, first)
        for ax, (title, lines) in zip(others, curves.items(), strict=True):
            plot_curves(lines, ax).set_ylabel(title)
    return first  # type: ignore[no-any-return]


def _curves(runs: Mapping[str, RunFolder]) -> dict[str, Curves]:
    """Return per plot of ``curves_of`` the lines of all runs, named by run and task."""
    plots: dict[str, Curves] = {}
    for label, run in runs.items():
        for title, lines in curves_of(run.log).items():
            plots.setdefault(title, {}).update({f"{label}: {task}": points for task, points in lines.items()})
    return plots


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
    return markdown_table([[name, *texts] for name, texts in as_texts(rows).items()])


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
