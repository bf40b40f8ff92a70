"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan, nan
from typing import Any

from rich.table import Table
from rich.text import Text

from cakeflow.data.request import EditRequest
from cakeflow.errors import counted, listed, visible
from cakeflow.evaluation.outcome import by_prompt, is_good
from cakeflow.export.manifest import batch_names
from cakeflow.forward.packing import GIB
from cakeflow.journal.ledger import Entry
from cakeflow.journal.schema import (
    BatchBody,
    Circumstances,
    EndBody,
    EvaluationBody,
    FreeAnswer,
    ModelBody,
    PolicyBody,
    RollbackBody,
    RunBody,
)
from cakeflow.journal.steps import EditStep
from cakeflow.plugins import Plugin
from cakeflow.report.comparison import DELTA, as_texts, short_names
from cakeflow.report.intervals import IMAGES, KINDS, is_share
from cakeflow.storage.typed import Schema
from cakeflow.tracing import Trace

PROPOSED = ("paraphrase", "neighborhood")
"""Kinds of checks that a fact can have."""
LABEL = 20
"""Least width of a column of names."""
HEADLINES = (*KINDS, "learned", "learned_chat", *IMAGES)
"""Metrics of an evaluation that a ledger's table shows, where they were measured."""


def metrics_table(columns: Mapping[str, Mapping[str, float]], protocol: str = "") -> Table:
    """Return metrics, one column per stage, without those that are nan at all.

    Those of an evaluation are times 100, as in published tables; of what callbacks measure only ``is_share`` are.
    """
    table = Table(title=_cell(f"Metrics (shares in %){protocol and f', {protocol}'}"), title_justify="left")
    table.add_column("metric")
    for name in columns:
        table.add_column(_cell(name), justify="right")
    for metric in dict.fromkeys(metric for column in columns.values() for metric in column):
        values = [column.get(metric, nan) for column in columns.values()]
        if any(value == value for value in values):
            form = "{:.1f}" if (times := 100 if is_share(metric) or "/" not in metric else 1) == 100 else "{:.4g}"
            table.add_row(_cell(metric), *(form.format(times * value) if value == value else "" for value in values))
    return table


def phases_table(timings: Mapping[str, float], peaks: Mapping[str, float], edits: int) -> Table:
    """Return seconds per phase, in total and per edit, and peak memory beyond the model, without idle phases."""
    table = Table(title="Time and memory", title_justify="left")
    for name in ("phase", "seconds", "per edit", "peak GiB"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for phase, seconds in timings.items():
        if seconds >= 0.05:
            peak = peaks.get(phase, float("nan")) / GIB
            each = f"{seconds / edits:.2f}" if edits else ""
            table.add_row(_cell(phase), f"{seconds:.1f}", each, f"{peak:.2f}" if peak == peak else "")
    return table


def requests_table(requests: Sequence[EditRequest]) -> Table:
    """Return facts as they were understood: subject, new answer, and the checks that are proposed for them."""
    table = Table(title="Facts to edit", title_justify="left", show_lines=True)
    for name in ("sentence", "subject", "new answer", "wordings to check", "neighbors to check"):
        table.add_column(name)
    for request in requests:
        checks = ["\n".join(each.prompt for each in request.probes if each.kind == kind) for kind in PROPOSED]
        table.add_row(*map(_cell, (request.text, request.subject, request.target_new)), *map(_lines, checks))
    return table


def rows_table(rows: Sequence[Mapping[str, str]], title: str) -> Table:
    """Return rows of texts as a table, whose columns are the names of the first row."""
    table = Table(title=title, title_justify="left", show_lines=True)
    for name in rows[0]:
        table.add_column(_cell(name))
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    return table


def answers_table(answers: Sequence[FreeAnswer], title: str, most: int = 50) -> Table:
    """Return questions with their answers before and after, a row per prompt; of many, those that failed come first.

    Args:
        answers: Questions as completions, in a chat, or both.
        title: Title of the table.
        most: Most rows.
    """
    rows = by_prompt(sorted(answers, key=is_good) if len(answers) > most else answers)
    forms = [form for form in ("completion", "chat") if any(form in row for row in rows.values())]
    table = Table(title=title, title_justify="left", show_lines=True)
    for name in ("prompt", "expected", *(f"{stage}, {form}" for form in forms for stage in ("before", "after"))):
        table.add_column(name)
    for prompt, row in list(rows.items())[:most]:
        pairs = [row.get(form) for form in forms]
        texts = [text for each in pairs for text in ((each.before, each.after or "") if each else ("", ""))]
        cells = (prompt, next(iter(row.values())).expected, *texts)
        table.add_row(*(_cell(" ".join(text.split())) for text in cells))
    if len(rows) > most:
        table.caption = f"{len(rows) - most} more are in answers.jsonl"
    return table


def plugins_table(plugins: Sequence[Plugin]) -> Table:
    """Return the installed plugins; the last column says why one cannot be used."""
    table = Table(title="Plugins", title_justify="left")
    for name in ("name", "slot", "class", "package", "problem"):
        table.add_column(name, overflow="fold")
    for plugin in plugins:
        table.add_row(*map(_cell, (plugin.name, plugin.slot, plugin.path, plugin.package, plugin.problem)))
    return table


def trace_table(trace: Trace, weights: Mapping[int, float]) -> Table:
    """Return score, standard error and weight of each traced layer."""
    table = Table(title="Causal trace: indirect effect at the subject's last token", title_justify="left")
    for name in ("layer", "AIE", "standard error", "weight"):
        table.add_column(name, justify="right")
    for layer, score in trace.scores.items():
        weight = f"{weights[layer]:.4f}" if layer in weights else ""
        table.add_row(str(layer), f"{score:.4f}", f"{trace.errors[layer]:.4f}", weight)
    return table


def runs_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return runs side by side, from ``compare_runs``, one column per run under the end of its path."""
    table = Table(title="Runs, metrics after editing (%) [95 % interval]", title_justify="left")
    table.add_column("", overflow="fold", min_width=LABEL)
    for name, texts in as_texts(rows).items():
        if name == "run":
            for text in short_names(texts):
                table.add_column(_cell(text), overflow="fold")
        else:
            table.add_row(_cell(name.removeprefix("settings.")), *map(_cell, texts))
        if name.startswith(DELTA):
            table.caption = f"{DELTA.strip()}: difference from the first run, paired by record"
    return table


def ledger_table(entries: Sequence[Entry]) -> Table:
    """Return the entries of a ledger: what happened, when and by whom, with the first digits of each hash."""
    table = Table(title="Ledger", title_justify="left")
    for name in ("entry", "time (UTC)", "kind", "details", "who", "hash"):
        table.add_column(name, overflow="fold", justify="right" if name == "entry" else "left")
    who, requests = "", dict[str, Mapping[str, Any]]()
    for entry in entries:
        who = entry.body.who if isinstance(entry.body, Circumstances) else who
        if isinstance(entry.body, BatchBody):
            requests |= zip(entry.body.hashes, entry.body.requests, strict=False)  # texts may not be on record
        cells = (entry.time[:19].replace("T", " "), entry.kind, _details(entry.body, requests), who, entry.hash[:12])
        table.add_row(str(entry.number), *map(_cell, cells))
    return table


def _details(body: Schema, requests: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what an entry says; ``requests`` are those on record so far, by their hashes."""
    match body:
        case ModelBody():
            return f"{body.fingerprint[:12]}, {body.dtype}"
        case RunBody():
            if not body.edits:  # none beforehand: a page, on which they are made one by one
                return f"{body.model}, by hand"
            return f"{body.model}, {counted(body.edits, 'edit')} in batches of {body.batch_size or body.edits}"
        case EvaluationBody():
            there = [name for name in HEADLINES if not isnan(body.metrics.get(name, nan))]
            rates = [f"{name} {100 * body.metrics[name]:.1f}" for name in there]
            return f"{body.stage}, {counted(body.edits, 'edit')}" + _behind(rates)
        case BatchBody():
            on_record = [requests[name] for name in body.undone or body.hashes if name in requests]
            facts = [f"{each.get('subject')} -> {each.get('target_new')}" for each in on_record[:3]]
            facts += ["..."] if len(on_record) > 3 else []
            undone = f"{counted(len(body.undone), 'fact')} taken back"
            return f"batch {body.batch}, {undone if body.undone else counted(len(body.hashes), 'edit')}" + _behind(
                facts
            )
        case RollbackBody():
            return f"{batch_names(body.batches)} taken back"
        case PolicyBody():
            return "; ".join([body.outcome, *([listed(body.faults, 3)] if body.faults else [])])
    return f"{len(body.files)} files" if isinstance(body, EndBody) else ""


def _behind(parts: Sequence[str]) -> str:
    """Return parts behind a colon, and nothing where there are none."""
    return f": {', '.join(parts)}" if parts else ""


def _lines(text: str) -> Text:
    """Return several lines as ``_cell`` returns one."""
    return Text(visible(text, lines=True))


def _cell(text: str) -> Text:
    """Return what others wrote as it is to be shown: neither markup nor anything that the terminal obeys."""
    return Text(visible(text))


def verdict(steps: Sequence[EditStep]) -> str:
    """Say in one line how many facts took, and which did not and why; empty where no batch was asked.

    A fact took if every token of its target is the most likely one on its own prompt, right after the last batch that
    wrote it.

    Args:
        steps: Edit batches.
    """
    last = {step.hashes[i]: (step, i, fact) for step in steps for i, fact in enumerate(step.facts)}
    facts = list(last.values())
    if not facts:
        return ""
    failed = [
        f"{step.requests[i].text!r} ({fact.reason})"
        if step.requests
        else f"fact {i} of batch {step.number} ({fact.reason})"
        for step, i, fact in facts
        if not fact.taken
    ]
    return f"{len(facts) - len(failed)} of {len(facts)} facts learned" + (
        f"; not learned: {listed(failed)}" if failed else ""
    )
