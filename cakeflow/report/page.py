"""A run as one self-contained HTML page: it needs no network, no other file, and no script to be readable."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from statistics import median
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes

from cakeflow.errors import visible
from cakeflow.evaluation.outcome import by_prompt, is_good
from cakeflow.forward.packing import GIB
from cakeflow.report import views
from cakeflow.report.figures import (
    by_layer,
    curves_of,
    plot_convergence,
    plot_curves,
    plot_heads,
    plot_layers,
    plot_losses,
    svg,
)
from cakeflow.report.folder import RunFolder
from cakeflow.report.intervals import estimate, number

METRICS = {
    "efficacy": ("Efficacy", "edited prompts answered with the new target"),
    "generalization": ("Generalization", "paraphrases answered with the new target"),
    "specificity": ("Specificity", "prompts about other subjects with their answer unchanged"),
    "editscore": ("EditScore", "harmonic mean of the three"),
}
"""The metrics at the top of the page: name -> title and description."""
IMAGE_METRICS = {
    "sr": ("SR", "edited images with their right label"),
    "gr": ("GR", "held-out images of the same error with their right label"),
    "lr": ("LR", "unrelated images that keep their label"),
    "mirror": ("Mirror", "images of the opposite error with their right label"),
}
"""The same of a run of images."""
KIND_NAMES = {
    "rewrite": "prompt",
    "paraphrase": "paraphrases",
    "neighborhood": "neighbors",
    "generalization": "same error",
    "locality": "unrelated",
    "mirror": "mirror",
}
"""Kind of a prompt or picture -> its name on the page."""
FILTERS = {
    "rewrite": ("prompt fails", "prompt, failures first"),
    "paraphrase": ("a paraphrase fails", "paraphrases, failures first"),
    "neighborhood": ("a neighbor fails", "neighbors, failures first"),
}
"""Kind of a prompt -> the choice of edits where one fails, and their order by it."""
IMAGE_FILTERS = {
    "rewrite": ("the edited image fails", "edited image, failures first"),
    "generalization": ("one of the same error fails", "same error, failures first"),
    "locality": ("an unrelated one fails", "unrelated, failures first"),
    "mirror": ("one of the mirror fails", "mirror, failures first"),
}
"""The same of a run of images."""
MISLEADING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters and marks of the writing direction, with which a text can look like another one."""
PER_LAYER = {
    "share": "part of the remaining residual that the layer takes",
    "drift": "distance of the layer's effect at the value site from its share",
    "residual": "mean norm of the layer's residual",
    "update": "norm of the weight change",
    "relative_update": "norm of the weight change over that of the weight",
}
"""Numbers logged per layer, in the order of the page -> caption; any others follow."""
MOST_BATCHES = 12
"""Largest number of batches drawn in one plot of layers."""


@dataclass(frozen=True)
class Figure:
    """A plot: the ``<svg>`` element, its content in words for screen readers, and its caption."""

    svg: Markup
    words: str
    caption: str


def render_page(run: RunFolder) -> str:
    """Return the page of a run.

    Everything from the run folder is escaped, and the page's own script is the only one that a browser may execute.

    Args:
        run: The run folder.

    Returns:
        HTML; the same for the same folder.
    """
    environment = page_environment()
    environment.filters["by_prompt"] = by_prompt
    environment.tests["good"] = is_good
    changes, edits = views.run_changes(run), views.edit_views(run)
    images, relations = any(view.picture for view in edits), views.relations(run)
    return rendered(
        environment,
        "page.html",
        run=run,
        info=run.info,
        model=PurePath(run.info.model.source).name,
        method=views.method(run),
        changes=changes,
        health=views.health(run),
        metrics=METRICS,
        images=images,
        tiles=IMAGE_METRICS if images else METRICS,
        filters=IMAGE_FILTERS if images else FILTERS,
        names=KIND_NAMES | ({"rewrite": "edited image"} if images else {}),
        heads=_heads(run),
        relations=relations,
        relation_metrics=[name for name in METRICS if any(name in each.changes for each in relations)],
        edits=edits,
        phases=_phases(run),
        moments=_moments(run),
        **_layers(run),
        **_figures(run),
    )


def page_environment(package: str = "cakeflow.report") -> Environment:
    """Return what renders templates of a package's ``assets``; everything that is put in is escaped.

    Args:
        package: The package; the parts of this one can be imported in its templates.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(each, "assets") for each in dict.fromkeys((package, "cakeflow.report"))]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_readable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "estimate": estimate}
    return environment


def rendered(environment: Environment, template: str, **values: Any) -> str:
    """Return a page, with its style and its own script, which is the only one that a browser may execute.

    Args:
        environment: From ``page_environment``.
        template: Name of the template.
        values: What it shows.
    """
    css, script = (Markup(_asset(environment, name)) for name in ("page.css", "page.js"))  # ours, and no HTML
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = environment.get_template(template).render(css=css, script=script, digest=digest, **values)
    return text.encode("utf-8", "replace").decode("utf-8")  # JSON may hold lone surrogates, which no file can


def _readable(value: Any) -> Any:
    """Return a text of the run as what is in it, whatever it would like to look like."""
    return MISLEADING.sub(lambda match: visible(match[0]), value) if type(value) is str else value


def _asset(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _figure(name: str, words: str, caption: str, draw: Callable[[Axes], object]) -> Figure:
    return Figure(Markup(svg(draw, name)), words, caption)  # matplotlib escapes the texts it draws


def _layers(run: RunFolder) -> dict[str, Any]:
    """Return the numbers logged per layer: those of the last batch, and plots of all batches (a sample of many)."""
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
        legend.remove()  # the title of the figure names the only quantity

    return draw


def _heads(run: RunFolder) -> Figure | None:
    """Return a heat map of the heads' scores in the last batch; None if none were logged."""
    scores = views.head_scores(run)
    if not scores:
        return None
    highest = sorted(scores, key=lambda place: -scores[place])[:3]
    words = "highest: " + ", ".join(f"layer {l} head {h} {number(scores[l, h])}" for l, h in highest)  # noqa: E741
    caption = "positive: the images' loss is lower without the head"
    return _figure("heads", f"Scores of attention heads, {words}", caption, lambda ax: plot_heads(scores, ax))


def _figures(run: RunFolder) -> dict[str, Any]:
    """Return plots of the target losses and of the measurements along the edits."""
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


def _moments(run: RunFolder) -> dict[str, Figure]:
    """Return plots of how the second moments settled; none where that is not known."""
    positive = {
        layer: [each for each in points if each.tokens > 0 and each.change > 0]  # others cannot have been measured
        for layer, points in run.info.convergence.items()
    }
    layers = {layer: points for layer, points in positive.items() if points}
    thresholds = {number(points[-1].threshold) for points in layers.values()}
    plots = {
        "change": ("Change of C", "since half as many tokens, over C (Frobenius norms)"),
        "null": ("Null directions", f"eigenvalues of C below {', '.join(sorted(thresholds))}"),
    }
    return {
        title: _figure(
            f"moments-{name}",
            "; ".join(
                f"layer {layer}: " + ", ".join(f"{number(getattr(at, name))} after {at.tokens} tokens" for at in points)
                for layer, points in layers.items()
            ),
            caption,
            lambda ax, name=name: plot_convergence(layers, name, ax),  # type: ignore[misc]
        )
        for name, (title, caption) in plots.items()
        if layers
    }


def _curve_plot(lines: Mapping[str, Sequence[tuple[float, float, float]]]) -> Callable[[Axes], object]:
    return lambda ax: plot_curves(lines, ax)


def _summary(values: Sequence[float]) -> str:
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return "none is a number"
    return f"median {number(median(values))}, from {number(min(values))} to {number(max(values))}"


def _course(label: str, points: Sequence[tuple[float, float, float]]) -> str:
    return f"{label}: " + ", ".join(f"{number(value)} after {number(edits)} edits" for edits, value, _ in points)


def _phases(run: RunFolder) -> list[dict[str, Any]]:
    """Return the seconds of each phase, their share of the total, and its peak memory in GiB."""
    timings = {phase: 0 if math.isnan(seconds) else seconds for phase, seconds in run.info.timings.items()}
    total = sum(timings.values()) or 1
    return [
        {
            "name": phase,
            "seconds": seconds,
            "part": seconds / total,
            "per_edit": seconds / run.timed if run.timed else math.nan,
            "peak": run.info.peaks.get(phase, math.nan) / GIB,
        }
        for phase, seconds in timings.items()
    ]
