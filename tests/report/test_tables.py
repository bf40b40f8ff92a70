"""The tables that people look at."""

import io

import matplotlib.pyplot as plt
import pytest
import torch
from rich.console import Console

from cakeflow.errors import ConfigError
from cakeflow.report import (
    metrics_table,
    phases_table,
    plot_layers,
    plot_trace,
    plot_weights,
    save_plot,
    texts_table,
    trace_table,
)
from cakeflow.tracing import PLACES, Trace


def shown(table):
    console = Console(width=120, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_metrics_are_percent_with_one_column_per_stage():
    lines = shown(metrics_table({"before": {"efficacy": 0.125}, "after": {"efficacy": 1.0}})).splitlines()
    row = next(line for line in lines if "efficacy" in line)
    assert row.index("12.5") < row.index("100.0")


def test_times_are_given_in_all_and_per_edit():
    times, peaks = {"targets": 8.0, "trace": 0.001, "keys": 1.0}, {"targets": 3 * 2**29, "keys": float("nan")}
    words = set(shown(phases_table(times, peaks, edits=4)).replace("│", " ").split())
    assert {"targets", "8.0", "2.00", "1.50"} <= words
    assert not {"trace", "nan"} & words


def test_markup_in_a_text_is_shown_as_it_is():
    text = shown(texts_table(["[bold]x[/] is"], ["[red]"], ["a [/b]"], ["c"]))
    assert "[bold]x[/] is" in text
    assert "a [/b]" in text


def trace(places):
    effects = torch.full((4, len(PLACES), 3), torch.nan, dtype=torch.float64)
    effects[:, places] = torch.rand(4, len(places), 3, dtype=torch.float64)
    settings = {"layers": [2, 3, 5], "role": "mlp_out", "window": 1}
    return Trace(torch.ones(4).double(), torch.zeros(4).double(), effects, settings)


def test_a_trace_is_a_row_per_layer():
    found = trace([2])
    lines = shown(trace_table(found, {2: 0.5, 3: 0.25})).splitlines()
    row = next(line for line in lines if line.replace("│", " ").split()[:1] == ["3"])
    assert row.replace("│", " ").split() == ["3", f"{found.scores[3]:.4f}", f"{found.errors[3]:.4f}", "0.2500"]


@pytest.mark.parametrize("places", [[2], [0, 2, 5]])
def test_the_map_shows_the_places_that_were_traced(places, tmp_path):
    found = trace(places)
    ax = plot_trace(found)
    assert [label.get_text() for label in ax.get_yticklabels()] == [PLACES[place] for place in places]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["2", "3", "5"]
    assert ax.images[0].get_array().tolist() == pytest.approx(found.map[places].numpy())
    save_plot(ax, tmp_path / "deep" / "map.png")
    assert (tmp_path / "deep" / "map.png").read_bytes().startswith(b"\x89PNG")
    assert not plt.get_fignums()


def test_plots_draw_where_they_are_told():
    _, (left, right) = plt.subplots(1, 2)
    assert plot_trace(trace([2]), left) is left
    assert plot_weights({1: 0.2, 2: 0.4}, {1: 0.25, 2: 0.75}, right) is right
    assert [bar.get_height() for bar in right.patches] == [0.2, 0.4]
    plt.close("all")


def test_layers_are_drawn_by_number_one_line_per_name_and_batch():
    rows = [{"layer2/drift": 1.0, "layer10/drift": 3.0, "drift": 4.0, "layer2/shift": 9.0}, {"layer2/drift": 2.0}]
    ax = plot_layers(rows, ["drift"])
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in ax.get_lines()]
    assert lines == [([2, 10], [1.0, 3.0]), ([2], [2.0])]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["drift"]
    plt.close(ax.figure)
    given = plt.figure().gca()
    assert plot_layers(rows[0], ["drift", "shift"], given) is given
    assert len(given.get_lines()) == 2
    plt.close(given.figure)


def test_what_was_not_logged_is_named():
    with pytest.raises(ConfigError, match="mismatch"):
        plot_layers({"layer1/drift": 1.0}, ["mismatch"])
    plt.close("all")
