"""Content of a run's page and of a comparison, computed from the run folder; no markup here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import get_args

import numpy as np

from cakeflow.callbacks.health import STATES, worst
from cakeflow.data.images import ImageProbeKind
from cakeflow.data.text import states
from cakeflow.evaluation.outcome import by_metric
from cakeflow.journal.schema import EvaluatedRequest, FreeAnswer, PromptAnswer
from cakeflow.report.folder import EditedRequest, RunFolder
from cakeflow.report.intervals import FORMS, KINDS, WORDS, Interval, paired, record_values

EDITING = ("targets", "keys", "allocate", "solve")
"""Phases of every edit batch; the others come once per run or per evaluation."""
PLAIN = {"": FORMS[""]}
"""The form of the metrics that the table of relations has."""


@dataclass(frozen=True)
class Change:
    """A metric before and after the edits, and its difference; nan where it was not measured."""

    before: Interval
    after: Interval
    difference: Interval


def metric_changes(
    before: Sequence[EvaluatedRequest],
    after: Sequence[EvaluatedRequest],
    logged: Mapping[str, Mapping[str, float]],
    forms: Mapping[str, str] = FORMS,
) -> dict[str, Change]:
    """Return the change of every metric that was measured at either stage.

    Intervals come from the records, where they determine the metric; otherwise the logged value is used, without
    interval. The difference is paired by record if both stages have the same ones.
    """
    values = {"before": record_values(before, forms), "after": record_values(after, forms)}
    differences = paired(before, after, forms)
    names = dict.fromkeys([*values["after"], *logged.get("before", {}), *logged.get("after", {})])
    changes = {}
    for name in names:
        sides = {stage: Interval.of(columns.get(name, np.empty(0))) for stage, columns in values.items()}
        for stage, side in sides.items():
            if math.isnan(side.mean):
                sides[stage] = Interval(logged.get(stage, {}).get(name, math.nan))
        difference = differences.get(name)
        if difference is None or math.isnan(difference.mean):
            difference = Interval(sides["after"].mean - sides["before"].mean)
        if not all(math.isnan(side.mean) for side in sides.values()):
            changes[name] = Change(**sides, difference=difference)
    return changes


def run_changes(run: RunFolder) -> dict[str, Change]:
    """Return the change of every metric of a run; of images, SR has the interval of the edited images' own answers."""
    logged = {stage: run.metrics(stage) for stage in ("before", "after")}
    changes = metric_changes(run.before or (), run.after or (), logged) | answer_changes(run.answers)
    if "sr" not in changes:
        return changes
    own = {name: changes.pop(name) for name in list(changes) if name in WORDS}
    return {**changes, "sr": own.get("efficacy_exact", changes["sr"])}


def answer_changes(answers: Sequence[FreeAnswer]) -> dict[str, Change]:
    """Return the change of the shares of free answers that are as expected."""
    changes = {}
    for name, chosen in by_metric(answers).items():
        before, after = (
            np.array([float(states(getattr(each, stage) or "", each.expected)) for each in chosen])
            for stage in ("before", "after")
        )
        changes[name] = Change(Interval.of(before), Interval.of(after), Interval.of(after - before, least=-1.0))
    return changes


@dataclass(frozen=True)
class Relation:
    """The records of one relation: the prompt of the first, their number, and the change of their metrics."""

    name: str
    example: str
    count: int
    changes: dict[str, Change]


def relations(run: RunFolder) -> list[Relation]:
    """Return every relation, the largest first; records without one are grouped by their prompt."""

    def name(record: EvaluatedRequest) -> str:
        return record.relation or record.prompt

    def grouped(records: Sequence[EvaluatedRequest] | None) -> dict[str, list[EvaluatedRequest]]:
        return {key: list(group) for key, group in groupby(sorted(records or (), key=name), name)}

    before, after = grouped(run.before), grouped(run.after)
    rows = []
    for key in before | after:
        group = after.get(key) or before[key]
        changes = metric_changes(before.get(key, ()), after.get(key, ()), {}, PLAIN)
        rows.append(Relation(key, group[0].prompt, len(group), changes))
    return sorted(rows, key=lambda relation: (-relation.count, relation.name))


def outcome(prompt: PromptAnswer) -> bool:
    """True if a prompt succeeds: against its rival or, where it has none, token by token."""
    return prompt.correct if prompt.success is None else prompt.success


@dataclass(frozen=True)
class Tally:
    """Number of prompts of a kind that succeed; None for a stage that was not evaluated."""

    before: int | None
    after: int | None
    total: int

    @property
    def rate(self) -> float:
        """Share of successes, of the edited model where it was evaluated."""
        return ((self.before if self.after is None else self.after) or 0) / self.total


@dataclass(frozen=True)
class EditView:
    """One edit on the page: the fact, its entry in the ledger, and its answers before and after.

    Attributes:
        number: Place in the order of the edits, from 0, as messages count.
        fact: Prompt, subject, targets and relation.
        edit: Entry in the ledger; None if the request was evaluated and not edited.
        tallies: Kind of prompt -> successes.
        prompts: Kind of prompt -> each prompt's answers before and after.
        texts: Prompt, text before and text after of every generation.
        picture: First digits of the hash of its picture; empty for a fact in words.
        thumbnail: That picture made small, as a PNG file in base64; empty if the run has none.
    """

    number: int
    fact: EvaluatedRequest | EditedRequest
    edit: EditedRequest | None
    tallies: dict[str, Tally] = field(default_factory=dict)
    prompts: dict[str, list[tuple[PromptAnswer | None, PromptAnswer | None]]] = field(default_factory=dict)
    texts: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    picture: str = ""
    thumbnail: str = ""


def edit_views(run: RunFolder) -> list[EditView]:
    """Return every request that was evaluated, then every edit that was not."""
    before, after = ({record.index: record for record in records or ()} for records in (run.before, run.after))
    waiting: dict[tuple[str, str, str], list[EditedRequest]] = {}
    for edit in run.edits:
        waiting.setdefault(edit.key, []).append(edit)
    views: list[EditView] = []
    for index in sorted({*before, *after}):
        old, new = before.get(index), after.get(index)
        fact = new or old
        assert fact is not None
        entries = waiting.get(fact.key)
        views.append(_view(len(views), fact, entries.pop(0) if entries else None, old, new))
    rest = [edit for entries in waiting.values() for edit in entries]
    views += [EditView(number, edit, edit) for number, edit in enumerate(rest, len(views))]
    return [_with_picture(view, run.thumbnails) for view in views]


def _with_picture(view: EditView, thumbnails: Mapping[str, str]) -> EditView:
    match = re.fullmatch(r"image ([0-9a-f]{12})", view.fact.subject)
    return replace(view, picture=match[1], thumbnail=thumbnails.get(match[1], "")) if match else view


def _view(
    number: int,
    fact: EvaluatedRequest,
    edit: EditedRequest | None,
    before: EvaluatedRequest | None,
    after: EvaluatedRequest | None,
) -> EditView:
    view = EditView(number, fact, edit)
    for kind in (*KINDS.values(), *get_args(ImageProbeKind)):
        old, new = (record.of_kind(kind) if record else [] for record in (before, after))
        if old or new:
            view.tallies[kind] = Tally(_hits(old), _hits(new), max(len(old), len(new)))
            view.prompts[kind] = _pairs(old, new)
    first, last = (
        {each.prompt: each.text for each in record.generations} if record else {} for record in (before, after)
    )
    view.texts.extend((prompt, first.get(prompt), last.get(prompt)) for prompt in last | first)
    return view


def _hits(prompts: Sequence[PromptAnswer]) -> int | None:
    return sum(map(outcome, prompts)) if prompts else None


def _pairs(
    before: Sequence[PromptAnswer], after: Sequence[PromptAnswer]
) -> list[tuple[PromptAnswer | None, PromptAnswer | None]]:
    """Return the answers to the same prompt at both stages; None where a stage does not have the prompt."""
    old, new = ({(prompt.prompt, prompt.expected): prompt for prompt in prompts} for prompts in (before, after))
    return [(old.get(key), new.get(key)) for key in new | old]


def layer_rows(run: RunFolder) -> list[dict[str, float]]:
    """Return the numbers that were logged per layer (``layer{l}/{name}``), batch by batch."""
    rows = ({name: value for name, value in row.items() if name.startswith("layer")} for row in run.log)
    return [row for row in rows if row]


@dataclass(frozen=True)
class Health:
    """The last word of ``StreamHealth``: the state, the number of edits behind it, and the quantities by name."""

    state: str
    edits: float
    numbers: dict[str, float]


def health(run: RunFolder) -> Health | None:
    """Return the health that was measured last; None if it was not measured."""
    rows = [row for row in run.log if row.get("health/state") in range(len(STATES))]
    if not rows:
        return None
    numbers = worst({name: value for name, value in rows[-1].items() if name.startswith("health/")})
    return Health(STATES[int(numbers.pop("state"))], numbers.pop("edits", math.nan), numbers)


def head_scores(run: RunFolder) -> dict[tuple[int, int], float]:
    """Return the scores of attention heads in the last batch that logged some: (layer, head) -> score."""
    for row in reversed(run.log):
        matches = ((re.fullmatch(r"heads/score/(\d{1,4})/(\d{1,4})", name), value) for name, value in row.items())
        scores = {(int(match[1]), int(match[2])): value for match, value in matches if match and not math.isnan(value)}
        if scores:
            return scores
    return {}


def losses(run: RunFolder) -> dict[int, list[float]]:
    """Return per value site (its layer) the loss of every edit's target value, in the order of editing."""
    values: dict[int, list[float]] = {}
    for edit in run.edits:
        for target in edit.targets:
            values.setdefault(target.layer, []).append(target.loss)
    return values


def method(run: RunFolder) -> str:
    """Return the classes of weighter, allocator and solver; classes that one wraps follow it in brackets.

    A method without a weighter, such as those for images, is named by its targets or heads, and its solver; one of none
    of these parts, such as a memory, by its class.

    A run has no name of its method, because a method is nothing but its parts.
    """
    parts = []
    slots: tuple[str, ...] = ("weighter", "allocator", "solver")
    if "weighter" not in run.info.settings:
        slots = tuple(name for name in ("targets", "heads", "search", "solver") if name in run.info.settings) or slots
    if not set(slots) & set(run.info.settings) and run.start is not None:
        return str(run.start.method.get("class_path", "?")).rpartition(".")[2]
    for slot in slots:
        names = re.findall(r"\b([A-Z]\w*)\(", str(run.info.settings.get(slot, "")))
        parts.append(f"{names[0]}({', '.join(names[1:])})" if names[1:] else "".join(names) or "?")
    return " + ".join(parts)


def seconds_per_edit(run: RunFolder) -> float:
    """Return the seconds of ``EDITING`` per edit that they are of; nan if they were not written, or are of none."""
    timings = run.info.timings
    seconds = [timings[phase] for phase in EDITING if not math.isnan(timings.get(phase, math.nan))]
    return sum(seconds) / run.timed if seconds and run.timed else math.nan


def peak_memory(run: RunFolder) -> float:
    """Return the largest number of bytes that editing took beyond the model; nan if it was not measured."""
    peaks = [peak for phase, peak in run.info.peaks.items() if phase != "evaluation"]
    return max((peak for peak in peaks if not math.isnan(peak)), default=math.nan)
