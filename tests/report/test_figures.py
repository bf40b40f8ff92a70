"""The plots, and how they get into a page."""

import re

import matplotlib.pyplot as plt
import pytest
import torch

from cakeflow.errors import ConfigError
from cakeflow.journal.schema import MomentPoint
from cakeflow.report import (
    curves_of,
    plot_convergence,
    plot_curves,
    plot_heads,
    plot_layers,
    plot_losses,
    plot_trace,
    plot_weights,
    save_plot,
)
from cakeflow.report.figures import svg
from cakeflow.tracing import PLACES, Trace


def trace(places):
    effects = torch.full((4, len(PLACES), 3), torch.nan, dtype=torch.float64)
    effects[:, places] = torch.rand(4, len(places), 3, dtype=torch.float64)
    settings = {"layers": [2, 3, 5], "role": "mlp_out", "window": 1}
    return Trace(torch.ones(4).double(), torch.zeros(4).double(), effects, settings)


@pytest.mark.parametrize("places", [[2], [0, 2, 5]])
def test_the_map_shows_the_places_that_were_traced(places, tmp_path):
    result = trace(places)
    ax = plot_trace(result)
    assert [label.get_text() for label in ax.get_yticklabels()] == [PLACES[place] for place in places]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["2", "3", "5"]
    assert ax.images[0].get_array().tolist() == pytest.approx(result.map[places].numpy())
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


def test_few_losses_are_points_and_many_have_a_running_median():
    ax = plot_losses({3: [0.5, 0.25], 7: [1.0, 2.0]})
    assert [list(line.get_ydata()) for line in ax.get_lines()] == [[0.5, 0.25], [1.0, 2.0]]
    values = [1.0] * 100 + [9.0] + [1.0] * 99
    each, middle = plot_losses({3: values}).get_lines()
    assert list(each.get_ydata()) == values
    assert set(middle.get_ydata()) == {1.0}
    plt.close("all")


def test_curves_have_a_line_each_with_intervals():
    ax = plot_curves({"cloze": [(0, 0.5, 0.1), (2, 0.25, 0.05)], "text": [(0, 20.0, float("nan"))]})
    (line, _, (bars,)), _ = ax.containers
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 2], [0.5, 0.25])
    assert bars.get_segments()[1][:, 1] == pytest.approx([0.25 - 1.96 * 0.05, 0.25 + 1.96 * 0.05])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["cloze", "text"]
    plt.close("all")


def test_general_ability_is_a_line_per_task_with_its_interval():
    rows = [{"ability/edits": n, "ability/rte/f1": 0.5 - n / 100, "ability/rte/f1_stderr": 0.1} for n in (0.0, 10.0)]
    ax = plot_curves(curves_of([{**row, "ability/cola/f1": 0.3} for row in rows])["ability f1"])
    (line, *_), *_ = ax.containers
    assert line.get_xydata().tolist() == [[0, 0.5], [10, 0.4]]
    (low, high) = ax.containers[0].lines[2][0].get_segments()[0][:, 1]
    assert (low, high) == (pytest.approx(0.5 - 0.196), pytest.approx(0.5 + 0.196))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["rte", "cola"]
    plt.close("all")


@pytest.mark.parametrize(("name", "values"), [("change", [1.0, 0.1]), ("null", [1371.0, 1391.0])])
def test_second_moments_are_a_line_per_layer_in_plain_numbers(name, values):
    points = [
        MomentPoint(tokens=tokens, change=change, threshold=0.02, null=null)
        for tokens, change, null in ((4096, 1.0, 1371), (8192, 0.1, 1391))
    ]
    ax = plot_convergence({"5": points, "6": points[:1]}, name)
    assert [list(line.get_ydata()) for line in ax.lines] == [values, values[:1]]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["4,096", "8,192"]
    plt.close("all")
    assert "$" not in svg(lambda ax: plot_convergence({"5": points}, name, ax), "m")


def test_an_svg_is_the_same_twice_and_takes_ids_and_colors_from_the_page():
    def draw(ax):
        plot_curves({"<b>$x$": [(0, 1.0, 0.1)], "other": [(1, 2.0, 0.1)]}, ax)

    text = svg(draw, "one")
    assert text == svg(draw, "one")
    assert text.startswith("<svg")
    assert "&lt;b&gt;$x$" in text
    assert not re.search(r"<(metadata|style|script|b)\b|#[0-9a-f]{6}|font-family", text)
    assert {"var(--series-1)", "var(--series-2)", "currentColor"} <= set(
        re.findall(r"var\(--series-.\)|currentColor", text)
    )
    names = [set(re.findall(r'\bid="([^"]*)"', each)) for each in (text, svg(draw, "two"))]
    assert len(names[0]) > 5
    assert names[0].isdisjoint(names[1])
    assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', text)) <= names[0]
    assert not plt.get_fignums()
    assert plt.rcParams["text.parse_math"]


def test_the_map_of_heads_has_a_cell_for_every_head():
    scores = {(layer, head): layer - 0.5 * head for layer in range(3) for head in range(2)}
    ax = plot_heads(scores)
    cells = ax.collections[0].get_array().reshape(2, 3)
    assert cells.tolist() == [[0.0, 1.0, 2.0], [-0.5, 0.5, 1.5]]
    assert ax.collections[0].get_clim() == (-2.0, 2.0)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1", "2"]
    assert svg(lambda ax: plot_heads(scores, ax), "heads") == svg(lambda ax: plot_heads(scores, ax), "heads")
