"""A run's result in the terminal."""

from __future__ import annotations

import sys

from rich.console import Console

from cakeflow.cli.console import say
from cakeflow.core.run import FitResult
from cakeflow.report.tables import answers_table, metrics_table, phases_table, verdict


def require_clean(result: FitResult) -> None:
    """End the command with status 1 unless every fact was learned and no rule of the budget was broken."""
    if not (result.outcome and result.outcome.is_clean):
        sys.exit(1)


def show_fit(result: FitResult) -> None:
    """Print metrics, times, every fact's answers, what else changed, and the verdict last."""
    console, outcome = Console(), result.outcome
    console.print(metrics_table({"before": result.before, "after": result.after}, result.protocol))
    console.print(phases_table(result.timings, result.peaks, result.timed))
    if outcome is not None:
        console.print(answers_table(outcome.of("fact"), "Answers about the edited facts"))
        if outcome.changed:
            console.print(answers_table(outcome.changed, "Other answers that changed"))
    if line := outcome.verdict if outcome else verdict(result.journal):
        say(line)
    if result.folder is not None:
        say(f"run folder: {result.folder}")
