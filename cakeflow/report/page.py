"""A run as one HTML page that needs nothing beside it: no network, no other file, and no script to be read."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from statistics import median
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes

from cakeflow.forward.packing import GIB
from cakeflow.report import views
from cakeflow.report.figures import by_layer, curves_of, plot_curves, plot_layers, plot_losses, svg
from cakeflow.report.folder import RunFolder
from cakeflow.report.intervals import estimate, number

METRICS = {
    "efficacy": ("Efficacy", "edited prompts that get the new target"),
    "generalization": ("Generalization", "paraphrases of them that do, too"),
    "specificity": ("Specificity", "prompts about other subjects that keep their own answer"),
    "editscore": ("EditScore", "harmonic mean of the three"),
}
"""The metrics that lead the page: name -> title and what it is."""
PER_LAYER = {
    "share": "what the layer takes of the remaining residual",
    "drift": "how far the layer's effect at the value site is from its share",
    "residual": "mean norm of what the layer was asked to add",
    "update": "norm of the weight change",
    "relative_update": "that norm over the weight's",
}
"""What is logged per layer, in the order of the page; whatever else was logged follows."""
MOST_BATCHES = 12
"""Batches drawn in one plot of layers."""


@dataclass(frozen=True)
class Figure:
    """A drawn plot: the ``<svg>`` element, what it shows in words, and its caption."""

    svg: Markup
    words: str
    caption: str


def render_page(run: RunFolder) -> str:
    """The page of a run: everything from the run folder is escaped, and the page's own script is the only one allowed.

    Args:
        run: What the run left on disk.

    Returns:
        HTML; the same for the same folder.
    """
    environment = Environment(
        loader=PackageLoader("cakeflow.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "estimate": estimate}
    css, script = (Markup(_asset(environment, name)) for name in ("page.css", "page.js"))  # ours, and no HTML
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = environment.get_template("page.html").render(
        run=run,
        info=run.info,
        model=PurePath(str(run.info["model"].get("source", "a model"))).name,
        method=views.method(run),
        css=css,
        script=script,
        digest=digest,
        changes=views.run_changes(run),
        metrics=METRICS,
        relations=views.relations(run),
        edits=views.edit_views(run),
        phases=_phases(run),
        **_layers(run),
        **_figures(run),
    )
    return text.encode("utf-8", "replace").decode("utf-8")  # JSON may hold lone surrogates, which no file can


def _asset(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _figure(name: str, words: str, caption: str, draw: Callable[[Axes], object]) -> Figure:
    return Figure(Markup(svg(draw, name)), words, caption)  # matplotlib escapes the texts it draws


def _layers(run: RunFolder) -> dict[str, Any]:
    """What was logged per layer: the last batch as a table, and all batches (some, of very many) as plots."""
    rows = views.layer_rows(run)
    names = dict.fromkeys(key.split("/", 1)[1] for row in rows for key in row if "/" in key)
    ordered = [*(name for name in PER_LAYER if name in names), *(name for name in names if name not in PER_LAYER)]
    last = {name: by_layer(rows[-1], name) for name in ordered}
    drawn = rows
    if len(rows) > MOST_BATCHES:
        drawn = [rows[place * (len(rows) - 1) // (MOST_BATCHES - 1)] for place in range(MOST_BATCHES)]
    figures = {
        name: _figure(
            f"layers-{place}",
            f"{name} by layer: {', '.join(f'layer {layer} {number(value)}' for layer, value in last[name].items())}",
            PER_LAYER.get(name, ""),
            _layer_plot(drawn, name),
        )
        for place, name in enumerate(ordered)
    }
    layers = sorted({layer for values in last.values() for layer in values})
    return {"layers": layers, "per_layer": last, "layer_figures": figures, "batches": len(rows)}


def _layer_plot(rows: Sequence[Mapping[str, float]], name: str) -> Callable[[Axes], object]:
    def draw(ax: Axes) -> None:
        legend = plot_layers(rows, [name], ax).get_legend()
        assert legend is not None
        legend.remove()  # the caption says it

    return draw


def _figures(run: RunFolder) -> dict[str, Any]:
    """Target losses, and what was measured along the edits."""
    losses, curves = views.losses(run), curves_of(run.log)
    loss = None
    if losses:
        words = "; ".join(f"layer {layer}: {_summary(values)}" for layer, values in losses.items())
        loss = _figure("losses", f"Loss of every edit's target value, {words}", "", lambda ax: plot_losses(losses, ax))
    along = {
        title: _figure(
            f"along-{place}",
            "; ".join(_course(label, points) for label, points in lines.items()),
            "bars are 95 % intervals" if any(point[2] == point[2] for line in lines.values() for point in line) else "",
            _curve_plot(lines),
        )
        for place, (title, lines) in enumerate(curves.items())
    }
    return {"loss": loss, "along": along, "curves": curves}


def _curve_plot(lines: Mapping[str, Sequence[tuple[float, float, float]]]) -> Callable[[Axes], object]:
    return lambda ax: plot_curves(lines, ax)


def _summary(values: Sequence[float]) -> str:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "none is a number"
    return f"median {number(median(known))}, from {number(min(known))} to {number(max(known))}"


def _course(label: str, points: Sequence[tuple[float, float, float]]) -> str:
    return f"{label}: " + ", ".join(f"{number(value)} after {number(edits)} edits" for edits, value, _ in points)


def _phases(run: RunFolder) -> list[dict[str, Any]]:
    """Seconds of each phase, its part of all of them, and its peak in GiB."""
    timings, peaks = run.info.get("timings", {}), run.info.get("peaks", {})
    total = sum(seconds or 0 for seconds in timings.values()) or 1
    return [
        {
            "name": phase,
            "seconds": seconds or 0,
            "part": (seconds or 0) / total,
            "per_edit": (seconds or 0) / max(1, run.size),
            "peak": (math.nan if peaks.get(phase) is None else peaks[phase]) / GIB,
        }
        for phase, seconds in timings.items()
    ]
