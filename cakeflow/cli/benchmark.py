"""The command ``cakeflow benchmark``."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from cakeflow.cli.console import say
from cakeflow.cli.loading import loading_words
from cakeflow.cli.words import words_of
from cakeflow.core.config_parser import import_words
from cakeflow.errors import command_line
from cakeflow.forward.packing import GIB
from cakeflow.models.loading import Loading
from cakeflow.report.intervals import number
from cakeflow.report.tables import rows_table
from cakeflow.storage.atomic import write_text
from cakeflow.suites import Arm, Estimate, Row, Rows, arms_of, plan, read_suite, render_suite, tables_of, to_markdown
from cakeflow.suites.rows import ROWS

PAGE, MARKDOWN = "suite.html", "suite.md"
"""Files that a suite ends with."""


def run_benchmark(
    suite: str = "small",
    out: Path | None = None,
    data: list[str] | None = None,
    model: str | None = None,
    model_config: str | None = None,
    methods: list[str] | None = None,
    sizes: list[int] | None = None,
    ability: str | None = None,
    plan_only: bool = False,
    loading: Loading = Loading(),
) -> list[Row]:
    """Measure many methods on the same facts: cakeflow benchmark --suite small --out runs/small.

    The plan comes first. A row is stored as each run ends, so the same command goes on with an interrupted suite, and
    several processes with it share the work.

    Args:
        suite: A shipped suite (small, paper) or a YAML file.
        out: Folder of rows, runs, suite.html and suite.md; runs/suite_NAME by default.
        data: Files of facts beside the suite's own, such as [counterfact.json].
        model: Another model.
        model_config: Tuned numbers for it, by name or as a YAML file.
        methods: Only these methods, and the baseline.
        sizes: Other numbers of facts, such as [10].
        ability: Folder of multiple-choice tasks for general ability, a TASK.jsonl each (plugins/README.md).
        plan_only: Print the plan, time and memory included, and stop.
        loading: --loading.NAME, how a model is loaded.

    Raises:
        ConfigError: If a suite, method, data set or metric is unknown, or facts lack a field that a metric needs.
        ResumeError: If the folder has rows of another suite or model.
        RequestError: Listing every bad request of a data set.
    """
    start = time.monotonic()
    parts = {"data": data, "methods": methods, "sizes": sizes}
    lists = {option: values for option, values in parts.items() if values}
    chosen = read_suite(suite, model=model, config=model_config, ability=ability, **lists)  # type: ignore[arg-type]
    arms, name = arms_of(chosen, loading), Path(suite).stem
    out = out or Path("runs") / f"suite_{name}"
    names = {"suite": suite, "out": str(out), "model": model, "model_config": model_config, "ability": ability}
    imports = import_words(*(part for arm in arms for part in arm.parts))
    words = ["benchmark", *imports, *words_of({**names, **lists})]
    words += loading_words(replace(loading, trust_remote_code=False))
    again = [*words, *words_of({"trust_remote_code": loading.trust_remote_code})]  # which no file keeps
    rows = Rows(out, lambda arm, row: say(_line(arm, row, time.monotonic() - start)), command_line(again))
    rows.check(arms)
    show_plan(plan(arms), rows)
    if plan_only:
        return []
    result = rows.measure(arms)
    tables = tables_of(arms, result, out)
    write_text(out / PAGE, render_suite(name, chosen, tables, words, out, imports))
    write_text(out / MARKDOWN, to_markdown(name, chosen, tables, words))
    for table in tables:
        for line in table.lines[1:]:
            say(f"{table.data}, {table.size}, {line.method}: {'; '.join(line.faults) or line.verdict}")
    say(f"written to {out / PAGE} and {out / MARKDOWN}")
    return result


def show_plan(estimates: Sequence[Estimate], rows: Rows) -> None:
    """Print what each arm would take, and what is left to do.

    Args:
        estimates: From ``plan``.
        rows: Rows that are there already.
    """
    lines = [
        {
            "data": f"{each.arm.data}, {each.arm.size}, seed {each.arm.seed}",
            "method": each.arm.method,
            "batch": str(each.arm.batch_size),
            "minutes": number(each.seconds / 60, ".1f"),
            "GiB": number(each.bytes / GIB, ".2f"),
            "measured": "yes" if each.arm.name in rows.stored else "no",
        }
        for each in estimates
    ]
    Console().print(rows_table(lines, "Plan: about so many minutes, GiB beyond the model"))
    rest = [each for each in estimates if each.arm.name not in rows.stored]
    sizes = [each.bytes for each in rest if each.bytes == each.bytes]
    say(
        f"{len(rest)} of {len(estimates)} runs to measure: {sum(each.seconds for each in rest) / 60:.0f} minutes on "
        f"this machine and its threads, to a factor of 3; the model takes {estimates[0].model / GIB:.2f} GiB, "
        f"edits up to {number(max(sizes, default=math.nan) / GIB, '.2f')} GiB more"
    )


def _line(arm: Arm, row: Row, seconds: float) -> str:
    """A row as it is measured, in one line."""
    values = ", ".join(f"{name} {number(row.metrics.get(name), '.3f')}" for name in arm.suite.metrics[:4])
    fault = row.fault and f"{row.fault} (a result as well; to run it again, delete its line in {ROWS})"
    return f"{seconds:7.0f} s  {row.arm}: {fault or values}"
