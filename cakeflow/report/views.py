"""What a run's page and a comparison show, computed from the run folder; no markup here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from cakeflow.report.folder import EditedRequest, EvaluatedRequest, PromptResult, RunFolder
from cakeflow.report.intervals import KINDS, Interval, paired, record_values

EDITING = ("targets", "keys", "allocate", "solve")
"""Phases that every edit batch goes through; the others come once per run or per evaluation."""
NOTHING = Interval(math.nan)


@dataclass(frozen=True)
class Change:
    """A metric before and after, and its difference; an interval of nan where it is not known."""

    before: Interval
    after: Interval
    difference: Interval

    @property
    def known(self) -> bool:
        """Whether there is a number at either stage."""
        return not (math.isnan(self.before.mean) and math.isnan(self.after.mean))


def metric_changes(
    before: Sequence[EvaluatedRequest], after: Sequence[EvaluatedRequest], logged: Mapping[str, Mapping[str, float]]
) -> dict[str, Change]:
    """Metric -> its change: with intervals where the records tell, as it was logged otherwise.

    The difference of the same records is taken record by record.
    """
    values, differences = {"before": record_values(before), "after": record_values(after)}, paired(before, after)
    names = dict.fromkeys([*values["after"], *logged.get("before", {}), *logged.get("after", {})])
    changes = {}
    for name in names:
        sides = {stage: Interval.of(found[name]) if name in found else NOTHING for stage, found in values.items()}
        for stage, side in sides.items():
            if math.isnan(side.mean):
                sides[stage] = Interval(logged.get(stage, {}).get(name, math.nan))
        difference = differences.get(name, NOTHING)
        if math.isnan(difference.half):
            difference = Interval(sides["after"].mean - sides["before"].mean)
        changes[name] = Change(**sides, difference=difference)
    return {name: change for name, change in changes.items() if change.known}


def run_changes(run: RunFolder) -> dict[str, Change]:
    """The metrics of a run."""
    return metric_changes(
        run.before or (), run.after or (), {stage: run.metrics(stage) for stage in ("before", "after")}
    )


@dataclass(frozen=True)
class Relation:
    """The records of one relation: their number, the prompt of the first, and their metrics."""

    name: str
    example: str
    count: int
    changes: dict[str, Change]


def relations(run: RunFolder) -> list[Relation]:
    """Every relation, the largest first; a record without one is grouped by its prompt, as its request is."""

    def name(record: EvaluatedRequest) -> str:
        return record.relation or record.prompt

    def grouped(records: Sequence[EvaluatedRequest] | None) -> dict[str, list[EvaluatedRequest]]:
        return {key: list(group) for key, group in groupby(sorted(records or (), key=name), name)}

    before, after = grouped(run.before), grouped(run.after)
    found = []
    for key in before | after:
        group = after.get(key) or before[key]
        changes = metric_changes(before.get(key, ()), after.get(key, ()), {})
        found.append(Relation(key, group[0].prompt, len(group), changes))
    return sorted(found, key=lambda relation: (-relation.count, relation.name))


def outcome(prompt: PromptResult) -> bool:
    """Whether a prompt succeeds: against its rival or, where it has none, token by token."""
    return prompt.correct if prompt.success is None else prompt.success


@dataclass(frozen=True)
class Tally:
    """How many prompts of a kind succeed; None for a stage that was not evaluated."""

    before: int | None
    after: int | None
    total: int

    @property
    def rate(self) -> float:
        """Share of successes, of the edited model where it was evaluated."""
        return ((self.before if self.after is None else self.after) or 0) / self.total


@dataclass(frozen=True)
class EditView:
    """One edit: the fact, its entry in the journal, and its record before and after.

    Attributes:
        number: Its place, from 1.
        fact: Prompt, subject, targets and relation.
        edit: Its entry in the journal; None if it was evaluated and not edited.
        tallies: Kind of prompt -> successes.
        prompts: Kind -> each prompt before and after.
        texts: Prompt, text before and text after of every generation.
    """

    number: int
    fact: EvaluatedRequest | EditedRequest
    edit: EditedRequest | None
    tallies: dict[str, Tally] = field(default_factory=dict)
    prompts: dict[str, list[tuple[PromptResult | None, PromptResult | None]]] = field(default_factory=dict)
    texts: list[tuple[str, str | None, str | None]] = field(default_factory=list)


def edit_views(run: RunFolder) -> list[EditView]:
    """Every record that was evaluated, then every edit that was not."""
    before, after = ({record.index: record for record in found or ()} for found in (run.before, run.after))
    waiting: dict[tuple[str, str, str], list[EditedRequest]] = {}
    for edit in run.edits:
        waiting.setdefault(edit.key, []).append(edit)
    shown: list[EditView] = []
    for index in sorted({*before, *after}):
        old, new = before.get(index), after.get(index)
        fact = new or old
        assert fact is not None
        entries = waiting.get(fact.key)
        shown.append(_view(len(shown) + 1, fact, entries.pop(0) if entries else None, old, new))
    left = [edit for entries in waiting.values() for edit in entries]
    return shown + [EditView(number, edit, edit) for number, edit in enumerate(left, len(shown) + 1)]


def _view(
    number: int,
    fact: EvaluatedRequest,
    edit: EditedRequest | None,
    before: EvaluatedRequest | None,
    after: EvaluatedRequest | None,
) -> EditView:
    view = EditView(number, fact, edit)
    for kind in KINDS.values():
        old, new = (record.of_kind(kind) if record else [] for record in (before, after))
        if old or new:
            view.tallies[kind] = Tally(_hits(old), _hits(new), max(len(old), len(new)))
            view.prompts[kind] = _pairs(old, new)
    earlier, later = (dict(record.generations) if record else {} for record in (before, after))
    view.texts.extend((prompt, earlier.get(prompt), later.get(prompt)) for prompt in later | earlier)
    return view


def _hits(prompts: Sequence[PromptResult]) -> int | None:
    return sum(map(outcome, prompts)) if prompts else None


def _pairs(
    before: Sequence[PromptResult], after: Sequence[PromptResult]
) -> list[tuple[PromptResult | None, PromptResult | None]]:
    """The same prompt at both stages; what has no partner stands alone."""
    old, new = ({(prompt.prompt, prompt.expected): prompt for prompt in prompts} for prompts in (before, after))
    return [(old.get(asked), new.get(asked)) for asked in new | old]


def layer_rows(run: RunFolder) -> list[dict[str, float]]:
    """What was logged per layer (``layer{l}/{name}``), batch by batch."""
    rows = ({name: value for name, value in row.items() if name.startswith("layer")} for row in run.log)
    return [row for row in rows if row]


def losses(run: RunFolder) -> dict[int, list[float]]:
    """Anchor layer -> loss of every edit's target value, in the order of editing."""
    found: dict[int, list[float]] = {}
    for edit in run.edits:
        for target in edit.targets:
            found.setdefault(target.layer, []).append(target.loss)
    return found


def method(run: RunFolder) -> str:
    """What was put together: the classes of weighter, allocator and solver, what a class wraps in brackets.

    A recipe's name is not kept in a run; its parts are.
    """
    parts = []
    for slot in ("weighter", "allocator", "solver"):
        names = re.findall(r"\b([A-Z]\w*)\(", str(run.info["settings"].get(slot, "")))
        parts.append(f"{names[0]}({', '.join(names[1:])})" if names[1:] else "".join(names) or "?")
    return " + ".join(parts)


def seconds_per_edit(run: RunFolder) -> float:
    """Seconds of ``EDITING`` over the edits; nan if they were not written."""
    timings = run.info.get("timings", {})
    spent = [timings[phase] for phase in EDITING if timings.get(phase) is not None]
    return sum(spent) / run.size if spent and run.size else math.nan


def peak_memory(run: RunFolder) -> float:
    """Most bytes that editing took beyond the model; nan if it is not known."""
    peaks = [peak for phase, peak in run.info.get("peaks", {}).items() if phase != "evaluation" and peak is not None]
    return max((peak for peak in peaks if not math.isnan(peak)), default=math.nan)
