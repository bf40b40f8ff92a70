"""The page of a suite, and the same as Markdown: tables, plots, verdicts, and the commands that repeat it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath

from markupsafe import Markup
from matplotlib.axes import Axes

from cakeflow.export.card import escape, markdown_table
from cakeflow.forward.packing import GIB
from cakeflow.report.figures import plot_intervals, svg
from cakeflow.report.intervals import Interval, estimate, is_share, number
from cakeflow.report.page import Figure, page_environment, rendered
from cakeflow.suites.rows import RUNS, Row
from cakeflow.suites.suite import Suite
from cakeflow.suites.tables import Line, Table, grouped

PLOTTED = 4
"""Most metrics in a plot: the first shares of a suite, one of each kind (``efficacy``, not its further forms)."""
READING = (
    "Shares are in percent, with 95 % intervals over the records of all seeds; a number without an interval is a mean "
    "over runs. Verdicts are from differences record by record, and not corrected for the number of comparisons."
)
"""How to read the tables, in the Markdown."""
ROW = 0.32
"""Height of a method in a plot, in inches."""


def render_suite(
    name: str, suite: Suite, tables: Sequence[Table], command: Sequence[str], folder: Path, imports: Sequence[str] = ()
) -> str:
    """Return the page of a suite as HTML that needs no network and no other file.

    Args:
        name: Name of the suite.
        suite: The suite as it was measured.
        tables: From ``tables_of``.
        command: The words that repeat it, after the program's name.
        folder: The folder of the suite, in which the runs are.
        imports: Words with which a command imports the modules of its classes.
    """
    rows = [row for table in tables for line in table.lines for row in line.rows]
    environment = page_environment("cakeflow.suites")
    environment.tests["beyond"] = _beyond
    return rendered(
        environment,
        "suite.html",
        name=name,
        suite=suite,
        model=PurePath(suite.model).name,
        facts=facts_of(rows),
        tables=tables,
        groups=grouped(suite.metrics),
        plots={(each.data, each.size): _figures(each, suite.metrics, place) for place, each in enumerate(tables)},
        command=shlex.join(["cakeflow", *command]),
        reproduce=[
            shlex.join(["cakeflow", "reproduce", *imports, str(folder / RUNS / row.arm)]) for row in rows if row.head
        ],
        rows=rows,
        gib=GIB,
    )


def facts_of(rows: Sequence[Row]) -> dict[str, str]:
    """Return what was the same, or differed, in all rows: model, protocols, machine and versions, in words."""
    columns = {
        "Model (SHA-256)": [row.fingerprint for row in rows if row.fingerprint],
        "Protocols": [row.protocol for row in rows if row.protocol],
        "Machine": [", ".join([*row.machine.values(), f"{row.threads} threads"]) for row in rows],
        "Versions": [", ".join(f"{name} {value}" for name, value in row.versions.items()) for row in rows],
        "Hours": [number(sum(row.seconds for row in rows if row.seconds == row.seconds) / 3600, ".2f")],
    }
    return {name: "; ".join(dict.fromkeys(values)) for name, values in columns.items()}


def to_markdown(name: str, suite: Suite, tables: Sequence[Table], command: Sequence[str]) -> str:
    """Return the page of a suite as Markdown: what was measured where, metrics group by group, verdicts and costs.

    Args:
        name: Name of the suite.
        suite: The suite.
        tables: From ``tables_of``.
        command: The words that repeat it, after the program's name.
    """
    rows = [row for table in tables for line in table.lines for row in line.rows]
    lines = [f"# Suite {escape(name)} on {escape(PurePath(suite.model).name)}", ""]
    lines += [f"- {title}: {escape(words)}" for title, words in facts_of(rows).items()]
    lines += ["", READING, "", f"    {shlex.join(['cakeflow', *command])}", ""]
    for table in tables:
        lines += [f"## {escape(table.data)}, {table.size} facts", ""]
        for title, names in grouped(suite.metrics).items():
            cells = [[line.method, *(estimate(each, line.metrics[each]) for each in names)] for line in table.lines]
            lines += [f"### {escape(title)}", "", markdown_table([["method", *names], *cells])]
        columns = ["method", f"against {suite.baseline}", "seconds per fact", "seconds of a run", "peak GiB"]
        lines += ["### verdicts and costs", "", markdown_table([columns, *map(_costs, table.lines)])]
    return "\n".join(lines)


def _costs(line: Line) -> list[str]:
    seconds, whole, peak = line.mean("seconds_per_edit"), line.mean("seconds"), line.mean("peak") / GIB
    end = "; ".join(line.faults) or line.verdict
    return [line.method, end, number(seconds, ".2f"), number(whole, ".0f"), number(peak, ".2f")]


def _beyond(interval: Interval) -> bool:
    """True if an interval leaves out 0."""
    return interval.low > 0 or interval.high < 0


def _figures(table: Table, columns: Sequence[str], place: int) -> dict[str, Figure]:
    """Return the plots of a table: shares with intervals, and differences from the baseline."""
    first = {name.partition("_")[0]: name for name in reversed(columns) if is_share(name)}
    names = [name for name in columns if name in first.values()][:PLOTTED]
    parts = {"Metrics": "metrics", "Differences from the baseline": "differences"}
    figures = {}
    for title, attribute in parts.items():
        shown = {name: _column(table.lines, attribute, name) for name in names}
        if shown := {name: column for name, column in shown.items() if column}:
            words = "; ".join(
                f"{name}: {', '.join(f'{method} {estimate(name, each)}' for method, each in column.items())}"
                for name, column in shown.items()
            )
            height = 1.2 + ROW * len(table.lines)
            picture = Markup(svg(_plot(shown), f"table{place}-{attribute}", height))  # matplotlib escapes its texts
            figures[title] = Figure(picture, words, "bars are 95 % intervals over records")
    return figures


def _column(lines: Sequence[Line], attribute: str, name: str) -> dict[str, Interval]:
    values: dict[str, Mapping[str, Interval]] = {line.method: getattr(line, attribute) for line in lines}
    return {method: each[name] for method, each in values.items() if not math.isnan(each[name].low)}


def _plot(columns: Mapping[str, Mapping[str, Interval]]) -> Callable[[Axes], object]:
    def draw(ax: Axes) -> None:
        plot_intervals(columns, ax)

    return draw
