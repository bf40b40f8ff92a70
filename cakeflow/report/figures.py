"""Plots, drawn into ``ax`` or into a new figure."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.ticker import MaxNLocator

from cakeflow.errors import ConfigError
from cakeflow.journal.schema import MomentPoint
from cakeflow.report.intervals import Interval
from cakeflow.tracing import PLACES, Trace


def plot_trace(trace: Trace, ax: Axes | None = None) -> Axes:
    """Draw a heat map of indirect effects by place and layer (CAKE, figure 6; ROME, figure 2)."""
    effects = trace.map
    traced = [place for place in range(len(PLACES)) if not bool(effects[place].isnan().all())]
    ax = ax or plt.figure(figsize=(2 + 0.25 * len(trace.layers), 1.5 + 0.3 * len(traced)), layout="tight").gca()
    image = ax.imshow(effects[traced].numpy(), aspect="auto", cmap="Purples", vmin=0)
    ax.set_yticks(range(len(traced)), [PLACES[place] for place in traced])
    step = -(-len(trace.layers) // 15)
    ax.set_xticks(range(0, len(trace.layers), step), [str(layer) for layer in trace.layers[::step]])
    ax.set_xlabel(f"layer whose {trace.settings['role']} output was restored")
    ax.set_title(f"Average indirect effect, {len(trace.effects)} facts", fontsize="medium")
    ax.figure.colorbar(image, ax=ax)
    return ax


def plot_weights(scores: Mapping[int, float], weights: Mapping[int, float], ax: Axes | None = None) -> Axes:
    """Draw the scores of layers beside the weights that follow from them (CAKE, figure 2)."""
    ax = ax or plt.figure(figsize=(2 + 0.5 * len(weights), 3), layout="tight").gca()
    layers = range(len(weights))
    bars = ax.bar([x - 0.2 for x in layers], [scores[layer] for layer in weights], 0.4, color="tab:purple")
    ax.set(xlabel="layer", ylabel="score (AIE)", xticks=list(layers), xticklabels=[str(layer) for layer in weights])
    other = ax.twinx()
    other.bar([x + 0.2 for x in layers], list(weights.values()), 0.4, color="tab:orange")
    other.axhline(1 / len(weights), color="grey", linewidth=0.8, linestyle="--")
    other.set_ylabel("weight; dashed: uniform")
    other.legend([bars, other.containers[0]], ["score", "weight"], loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return ax


def plot_layers(
    metrics: Mapping[str, float] | Sequence[Mapping[str, float]], names: Sequence[str], ax: Axes | None = None
) -> Axes:
    """Draw the numbers logged per layer (``layer{l}/{name}``): one line per name and edit batch, over the layers.

    ``["share"]`` shows the allocation ratios, ``["drift"]`` CAKE's figure 5, ``["shift_error", "shift_limit"]`` both
    sides of theorem 2, ``["sensitivity"]`` the distance of layers from the identity, ``["left_alone"]`` table 5's fits.

    Args:
        metrics: Logged numbers of one batch, or of several in order (later ones are drawn darker).
        names: Names of the numbers to draw.
        ax: Axes to draw into.

    Raises:
        ConfigError: If none of the names was logged.
    """
    rows = [metrics] if isinstance(metrics, Mapping) else list(metrics)
    ax = ax or plt.figure(figsize=(5, 3), layout="tight").gca()
    for color, name in enumerate(names):
        lines = [by_layer(row, name) for row in rows]
        if not any(lines):
            raise ConfigError(f"nothing was logged as 'layer{{l}}/{name}'; add the callback that measures it")
        for batch, values in enumerate(lines, 1):
            label = name if batch == len(lines) else None
            ax.plot(list(values), list(values.values()), "o-", color=f"C{color}", alpha=batch / len(lines), label=label)
    ax.set(xlabel="layer", xticks=sorted({layer for row in rows for name in names for layer in by_layer(row, name)}))
    ax.set_ylim(bottom=0)
    ax.legend(fontsize="small")
    return ax


def by_layer(metrics: Mapping[str, float], name: str) -> dict[int, float]:
    """Return per layer the number that was logged as ``layer{l}/{name}``."""
    matches = ((re.fullmatch(rf"layer(\d+)/{re.escape(name)}", key), value) for key, value in metrics.items())
    return {int(match[1]): float(value) for match, value in matches if match}


def plot_heads(scores: Mapping[tuple[int, int], float], ax: Axes | None = None) -> Axes:
    """Draw a heat map of attention heads: how much the loss falls without each.

    Args:
        scores: (layer, head) -> score.
        ax: Axes to draw into.
    """
    ax = ax or plt.figure(figsize=(5, 3), layout="tight").gca()
    layers, heads = (1 + max(place[axis] for place in scores) for axis in (0, 1))
    values = np.full((heads, layers), np.nan)
    for (layer, head), score in scores.items():
        values[head, layer] = score
    bound = float(np.nanmax(np.abs(values))) or 1.0
    drawn = ax.pcolormesh(values, cmap="PuOr_r", vmin=-bound, vmax=bound)
    ax.set(xlabel="layer", ylabel="head")
    for axis, count in ((ax.xaxis, layers), (ax.yaxis, heads)):
        step = -(-count // 12)
        axis.set_ticks([at + 0.5 for at in range(0, count, step)], [str(at) for at in range(0, count, step)])
    ax.figure.colorbar(drawn, ax=ax)
    return ax


def plot_losses(losses: Mapping[int, Sequence[float]], ax: Axes | None = None) -> Axes:
    """Draw the final loss of each edit's target search, in the order of editing, with a running median over many.

    Args:
        losses: Layer of the value site -> loss per edit.
        ax: Axes to draw into.
    """
    ax = ax or plt.figure(figsize=(5, 3), layout="tight").gca()
    for color, (layer, values) in enumerate(losses.items()):
        edits, width = range(1, len(values) + 1), len(values) // 50
        label = f"target at layer {layer}"
        if width < 2:
            ax.plot(edits, values, "o", markersize=4, alpha=0.7, color=f"C{color}", label=label)
            continue
        ax.plot(edits, values, linewidth=0.5, alpha=0.3, color=f"C{color}", label="_each edit")
        middle = [median(values[max(0, at - width) : at + width + 1]) for at in range(len(values))]
        ax.plot(edits, middle, color=f"C{color}", label=f"{label}, median of {2 * width + 1}")
    ax.set(xlabel="edit", ylabel="loss")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylim(bottom=0)
    ax.legend(fontsize="small")
    return ax


Curves = dict[str, list[tuple[float, float, float]]]


def curves_of(rows: Iterable[Mapping[str, float]]) -> dict[str, Curves]:
    """Return the measurements along the edits (ability, retention, ...) in logged rows or in a callback's ``rows``.

    A ``PeriodicCallback`` logs ``{name}/edits`` and, beside it, ``{name}/{metric}`` or ``{name}/{task}/{metric}``,
    perhaps with a ``_stderr``: this makes a plot per name and metric, with a line per task.

    Returns:
        Plot -> line -> points: edits so far, value, and standard error (nan if there is none).

    Example:
        >>> curves_of([{"ability/edits": 0.0, "ability/rte/f1": 0.5}, {"ability/edits": 9.0, "ability/rte/f1": 0.4}])
        {'ability f1': {'rte': [(0.0, 0.5, nan), (9.0, 0.4, nan)]}}
    """
    plots: dict[str, Curves] = {}
    for row in rows:
        for key, value in row.items():
            name, _, rest = key.partition("/")
            edits = row.get(f"{name}/edits")
            if edits is None or rest == "edits" or key.endswith("_stderr"):
                continue
            task, _, metric = rest.rpartition("/")
            point = edits, value, row.get(f"{key}_stderr", math.nan)
            plots.setdefault(f"{name} {metric}", {}).setdefault(task or metric, []).append(point)
    return plots


def plot_curves(curves: Mapping[str, Sequence[tuple[float, float, float]]], ax: Axes | None = None) -> Axes:
    """Draw measurements along the edits: a line each, with 95 % intervals.

    Args:
        curves: Label -> (edits so far, value, standard error) of every measurement.
        ax: Axes to draw into.
    """
    ax = ax or plt.figure(figsize=(5, 3), layout="tight").gca()
    for label, points in curves.items():
        edits, values, errors = zip(*points, strict=True)
        ax.errorbar(edits, values, [1.96 * error for error in errors], fmt="o-", markersize=4, capsize=3, label=label)
    ax.set_xlabel("edits")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=3)  # above: lines fill the plot
    return ax


def plot_intervals(runs: Mapping[str, Mapping[str, Interval]], ax: Axes | None = None) -> Axes:
    """Draw metrics of runs in percent, with their 95 % intervals: a row per metric, a color per run.

    Args:
        runs: Label -> metric -> interval; without bounds it is drawn as a point.
        ax: Axes to draw into.
    """
    ax = ax or plt.figure(figsize=(7, 4), layout="tight").gca()
    names = list(dict.fromkeys(name for metrics in runs.values() for name in metrics))
    for place, (label, metrics) in enumerate(runs.items()):
        rows = [names.index(name) + 0.8 * ((place + 0.5) / len(runs) - 0.5) for name in metrics]
        bounds = 100 * np.array([(each.mean, each.low, each.high) for each in metrics.values()]).reshape(-1, 3)
        means, lows, highs = bounds.T
        ax.errorbar(means, rows, xerr=[means - lows, highs - means], fmt="o", markersize=4, capsize=3, label=label)
    ax.set(xlabel="%, with 95 % intervals", yticks=range(len(names)), yticklabels=names)
    ax.invert_yaxis()
    ax.legend(fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return ax


def plot_convergence(layers: Mapping[str, Sequence[MomentPoint]], name: str, ax: Axes | None = None) -> Axes:
    """Draw how second moments settled as their tokens were read: a line per layer.

    Args:
        layers: Layer -> points of its second moment.
        name: ``change``, of C since half as many tokens, or ``null``, the number of its eigenvalues below a threshold.
        ax: Axes to draw into.
    """
    ax = ax or plt.figure(figsize=(5, 3), layout="tight").gca()
    for layer, points in layers.items():
        values = [getattr(each, name) for each in points]
        ax.plot([each.tokens for each in points], values, "o-", markersize=4, label=f"layer {layer}")
    ax.set(xlabel="tokens", xscale="log", ylabel={"change": "change of C", "null": "null directions"}[name])
    if name == "change":  # the first point's is 1
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")  # powers would be formulas, which texts of plots are not read as
    ticks = sorted({each.tokens for points in layers.values() for each in points})
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize="small")
    ax.minorticks_off()
    ax.legend(fontsize="small")
    return ax


def require_image(path: Path) -> None:
    """Check that a plot can be written to a file of this name.

    Raises:
        ConfigError: If its suffix names no format of images.
    """
    if path.suffix[1:].lower() not in FigureCanvasBase.get_supported_filetypes():
        raise ConfigError(f"{str(path)!r} names no image; end it in .png, .svg or .pdf")


def save_plot(ax: Axes, path: Path) -> None:
    """Write the figure of a plot to a file, and close it."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


FILE_STYLE: dict[str, Any] = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "legend.frameon": False,
    "text.parse_math": False,
}
"""Settings of matplotlib for plots whose texts are others'."""
INK, SERIES = "#0a0b0c", tuple(f"#0{number}0b0c" for number in range(1, 7))
"""Placeholder colors: ``svg`` replaces them with the CSS variables of the page."""
STYLE: dict[str, Any] = FILE_STYLE | {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.prop_cycle": cycler(color=SERIES),
    "svg.fonttype": "none",
    "svg.hashsalt": "cakeflow",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
"""Settings of matplotlib for ``svg``."""


def svg(draw: Callable[[Axes], object], name: str, height: float = 2.6) -> str:
    """Return a plot as an ``<svg>`` element in a page's colors and fonts: the same text for the same plot.

    Args:
        draw: Function that draws the plot into axes.
        name: Prefix of every id in the element, so that several can stand in one page.
        height: Height in inches.
    """
    buffer = io.StringIO()
    with plt.rc_context(STYLE):  # type: ignore[arg-type]
        figure = plt.figure(figsize=(4.4, height), layout="tight")
        try:
            draw(figure.gca())
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        finally:
            plt.close(figure)
    text = buffer.getvalue()
    text = re.sub(r"<(metadata|style).*?</\1>|font-family: [^;]*;", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' (?:width|height)="[^"]*pt"', "", text, count=2)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", text)
    for color, css in {INK: "currentColor", **{c: f"var(--series-{n})" for n, c in enumerate(SERIES, 1)}}.items():
        text = text.replace(color, css)
    return text
