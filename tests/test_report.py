"""The tables that people look at."""

import io

import pytest
from rich.console import Console

from cakeflow.generation import continuations
from cakeflow.report import metrics_table, texts_table, timings_table


def shown(table):
    console = Console(width=120, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_metrics_are_percent_with_one_column_per_stage():
    lines = shown(metrics_table({"before": {"efficacy": 0.125}, "after": {"efficacy": 1.0}})).splitlines()
    row = next(line for line in lines if "efficacy" in line)
    assert row.index("12.5") < row.index("100.0")


def test_times_are_given_in_all_and_per_edit():
    assert {"8.0", "2.00"} <= set(shown(timings_table({"targets": 8.0}, edits=4)).replace("│", " ").split())


def test_markup_in_a_text_is_shown_as_it_is():
    text = shown(texts_table(["[bold]x[/] is"], ["[red]"], ["a [/b]"], ["c"]))
    assert "[bold]x[/] is" in text
    assert "a [/b]" in text


@pytest.mark.parametrize("tokens", [1, 5])
def test_continuations_are_greedy_and_repeatable(lm, tokens):
    first = continuations(lm, ["The sea is", "Ann"], tokens)
    assert first == continuations(lm, ["The sea is", "Ann"], tokens)
    assert len(first) == 2
