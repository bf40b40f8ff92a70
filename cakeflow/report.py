"""What people look at: tables for the terminal, and plots. Plots draw into ``ax``, or into a new figure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from rich.table import Table
from rich.text import Text

from cakeflow.errors import ConfigError
from cakeflow.memory import GIB
from cakeflow.plugins import Plugin
from cakeflow.tracing import PLACES, Trace


def metrics_table(columns: Mapping[str, Mapping[str, float]]) -> Table:
    """Metrics in percent, one column per stage."""
    table = Table(title="Metrics (%)", title_justify="left")
    table.add_column("metric")
    for name in columns:
        table.add_column(name, justify="right")
    for metric in next(iter(columns.values()), {}):
        table.add_row(metric, *(f"{100 * column[metric]:.1f}" for column in columns.values()))
    return table


def phases_table(timings: Mapping[str, float], peaks: Mapping[str, float], edits: int) -> Table:
    """Seconds per phase, in all and per edit, and its peak memory beyond the model; idle phases are left out."""
    table = Table(title="Time and memory", title_justify="left")
    for name in ("phase", "seconds", "per edit", "peak GiB"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for phase, seconds in timings.items():
        if seconds >= 0.05:
            peak = peaks.get(phase, float("nan")) / GIB
            table.add_row(phase, f"{seconds:.1f}", f"{seconds / edits:.2f}", f"{peak:.2f}" if peak == peak else "")
    return table


def texts_table(prompts: Sequence[str], wanted: Sequence[str], before: Sequence[str], after: Sequence[str]) -> Table:
    """Prompts with their continuations before and after."""
    table = Table(title="Generations", title_justify="left", show_lines=True)
    for name in ("prompt", "new target", "before", "after"):
        table.add_column(name)
    for row in zip(prompts, wanted, before, after, strict=True):
        table.add_row(*(Text(" ".join(text.split())) for text in row))
    return table


def plugins_table(plugins: Sequence[Plugin]) -> Table:
    """Installed plugins; what is wrong with one stands in the last column."""
    table = Table(title="Plugins", title_justify="left")
    for name in ("name", "slot", "class", "package", "problem"):
        table.add_column(name, overflow="fold")
    for plugin in plugins:
        table.add_row(*map(Text, (plugin.name, plugin.slot, plugin.path, plugin.package, plugin.problem)))
    return table


def trace_table(trace: Trace, weights: Mapping[int, float]) -> Table:
    """Score, standard error and weight of each traced layer."""
    table = Table(title="Causal trace: indirect effect at the subject's last token", title_justify="left")
    for name in ("layer", "AIE", "standard error", "weight"):
        table.add_column(name, justify="right")
    for layer, score in trace.scores.items():
        weight = f"{weights[layer]:.4f}" if layer in weights else ""
        table.add_row(str(layer), f"{score:.4f}", f"{trace.errors[layer]:.4f}", weight)
    return table


def plot_trace(trace: Trace, ax: Axes | None = None) -> Axes:
    """Heat map of indirect effects by place and layer (CAKE, figure 6; ROME, figure 2)."""
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
    """Scores of layers beside the weights they became (CAKE, figure 2)."""
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
    """What was logged per layer (``layer{l}/{name}``): one line per name and edit batch, over the layers.

    ``["share"]`` shows the allocation ratios, ``["drift"]`` CAKE's figure 5, ``["shift_error", "shift_limit"]`` both
    sides of theorem 2, ``["sensitivity"]`` how far layers are from the identity, ``["left_alone"]`` table 5's fits.

    Args:
        metrics: Logged numbers of one batch, or of several in order (later ones are drawn darker).
        names: What to show.
        ax: Where to draw.

    Raises:
        ConfigError: If none of the names was logged.
    """
    rows = [metrics] if isinstance(metrics, Mapping) else list(metrics)
    ax = ax or plt.figure(figsize=(5, 3), layout="tight").gca()
    for color, name in enumerate(names):
        found = [_by_layer(row, name) for row in rows]
        if not any(found):
            raise ConfigError(f"nothing was logged as 'layer{{l}}/{name}'; add the callback that measures it")
        for batch, values in enumerate(found, 1):
            label = name if batch == len(found) else None
            ax.plot(list(values), list(values.values()), "o-", color=f"C{color}", alpha=batch / len(found), label=label)
    ax.set(xlabel="layer", xticks=sorted({layer for row in rows for name in names for layer in _by_layer(row, name)}))
    ax.set_ylim(bottom=0)
    ax.legend(fontsize="small")
    return ax


def _by_layer(metrics: Mapping[str, float], name: str) -> dict[int, float]:
    matches = ((re.fullmatch(rf"layer(\d+)/{re.escape(name)}", key), value) for key, value in metrics.items())
    return {int(match[1]): float(value) for match, value in matches if match}


def save_plot(ax: Axes, path: Path) -> None:
    """Write the figure of a plot, and close it."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
