"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from cakeflow.forward.packing import GIB
from cakeflow.journal.ledger import Entry
from cakeflow.plugins import Plugin
from cakeflow.report.comparison import DELTA, shown
from cakeflow.tracing import Trace


def metrics_table(columns: Mapping[str, Mapping[str, float]], protocol: str = "") -> Table:
    """Metrics times 100, as published tables show them, one column per stage; what no stage could judge is left out."""
    table = Table(title=f"Metrics (%){protocol and f', {protocol}'}", title_justify="left")
    table.add_column("metric")
    for name in columns:
        table.add_column(name, justify="right")
    for metric in next(iter(columns.values()), {}):
        values = [column[metric] for column in columns.values()]
        if any(value == value for value in values):
            table.add_row(metric, *(f"{100 * value:.1f}" for value in values))
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


def texts_table(prompts: Sequence[str], expected: Sequence[str], before: Sequence[str], after: Sequence[str]) -> Table:
    """Prompts with their continuations before and after."""
    table = Table(title="Generations", title_justify="left", show_lines=True)
    for name in ("prompt", "new target", "before", "after"):
        table.add_column(name)
    for row in zip(prompts, expected, before, after, strict=True):
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


def runs_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Runs side by side, from ``compare_runs``: one column per run."""
    table = Table(title="Runs, metrics after editing (%) ± half of the 95 % interval", title_justify="left")
    table.add_column("")
    for name, *texts in ([name, *texts] for name, texts in shown(rows).items()):
        if name == "run":
            for text in texts:
                table.add_column(Text(text), overflow="fold")
        else:
            table.add_row(name, *map(Text, texts))
        if name.startswith(DELTA):
            table.caption = f"{DELTA.strip()}: difference from the first run, paired by record"
    return table


def ledger_table(entries: Sequence[Entry]) -> Table:
    """Who did what, and when; the first digits of each entry's hash."""
    table = Table(title="Ledger", title_justify="left")
    for name in ("entry", "time (UTC)", "what", "details", "who", "hash"):
        table.add_column(name, overflow="fold", justify="right" if name == "entry" else "left")
    who = ""
    for entry in entries:
        who = str(entry.body.get("who", who))
        cells = (entry.time[:19].replace("T", " "), entry.kind, _details(entry.kind, entry.body), who, entry.hash[:12])
        table.add_row(str(entry.number), *map(Text, cells))
    return table


def _details(kind: str, body: Mapping[str, Any]) -> str:
    if kind == "batch":
        facts = [f"{each.get('subject')} -> {each.get('target_new')}" for each in body.get("requests", ())]
        more = ", ..." if len(facts) > 3 else ""
        edits = len(body.get("hashes", ()))
        return f"batch {body.get('batch')}, {edits} edits" + (f": {', '.join(facts[:3])}{more}" if facts else "")
    if kind == "rollback":
        return f"batches {', '.join(map(str, body.get('batches', ())))} taken back"
    if kind == "evaluation":
        rates = {name: body.get("metrics", {}).get(name) for name in ("efficacy", "generalization", "specificity")}
        found = [f"{name} {100 * value:.1f}" for name, value in rates.items() if isinstance(value, float)]
        return f"{body.get('stage')}, {body.get('edits')} edits: {', '.join(found)}"
    known = {
        "model": f"{str(body.get('fingerprint'))[:12]}, {body.get('dtype')}",
        "run": f"{body.get('model')}, {body.get('edits')} edits in batches of {body.get('batch_size')}",
        "policy": "; ".join([str(body.get("outcome")), *map(str, body.get("faults", ()))]),
        "end": f"{len(body.get('files', ()))} files",
    }
    return known.get(kind, "")
