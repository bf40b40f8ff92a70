"""One committed edit batch: its requests, changes and numbers."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral

import torch
from torch import Tensor

from cakeflow.data.request import EditRequest
from cakeflow.errors import ConfigError, RequestWarning, SharedKeyWarning, listed
from cakeflow.journal import force
from cakeflow.journal.changes import Change
from cakeflow.journal.ledger import canonical
from cakeflow.journal.schema import FactBody, TargetBody


@dataclass(frozen=True, eq=False)
class AppliedChange:
    """A change as a batch made it.

    Attributes:
        change: The change.
        numbers: What was logged of it.
    """

    change: Change
    numbers: dict[str, float]

    @property
    def place(self) -> str:
        """Name of the parameter or module that was changed."""
        return self.change.place


@dataclass(eq=False)
class EditStep:
    """One edit batch.

    Attributes:
        requests: The facts; empty if their texts were not stored.
        changes: The changes, in the order in which they were made.
        targets: How the target search of each request ended, layer by layer.
        facts: What became of each request; empty where it was not measured.
        values: Layer -> target values at its value site, n x d_out.
        importance: Layer -> what the search found of it there (``Targets.importance``), n x d_out; empty where no term
            of the search needs it.
        numbers: What was logged of the batch.
        hashes: SHA-256 of each request.
        before: Place -> SHA-256 of its content before the batch.
        after: Place -> the same when the batch was committed.
        inputs: Name -> SHA-256 of what the batch was solved with beside requests and settings.
        owners: For each row of keys, target values and their search the place of its request; empty where each request
            has one.
        undone: SHA-256 of each request of an earlier batch that this one takes back; it has no requests of its own.
        undoes: Number of that batch; -1 if there is none.
        replaced: SHA-256 of a request -> those of earlier batches' requests whose values gave way to its own, because
            they have one key.
        number: Number of the batch in its journal; rolled-back batches keep theirs. -1 until it is committed.
    """

    requests: tuple[EditRequest, ...]
    changes: list[AppliedChange] = field(default_factory=list)
    targets: list[TargetBody] = field(default_factory=list)
    facts: list[FactBody] = field(default_factory=list)
    values: dict[int, Tensor] = field(default_factory=dict)
    importance: dict[int, Tensor] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    hashes: tuple[str, ...] = ()
    before: dict[str, str] = field(default_factory=dict)
    after: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    owners: list[int] = field(default_factory=list)
    undone: tuple[str, ...] = ()
    undoes: int = -1
    replaced: dict[str, list[str]] = field(default_factory=dict)
    number: int = -1

    def __post_init__(self) -> None:
        self.hashes = self.hashes or tuple(map(request_hash, self.requests))

    def name(self, place: int) -> str:
        """Return a request for a message: its text, or the start of its hash where texts were not stored."""
        return repr(self.requests[place].text) if self.requests else self.hashes[place][:16]

    @property
    def completes(self) -> bool:
        """True if it belongs to no facts: it completed the run that the batch before it ended."""
        return not (self.hashes or self.undone)

    @property
    def key_hashes(self) -> list[str]:
        """For each row of keys the hash of its request."""
        return [self.hashes[i] for i in self.owners or range(len(self.hashes))]

    @property
    def places(self) -> list[str]:
        """The changed places, each once, in order."""
        return [*dict.fromkeys(part.place for part in self.changes)]


def with_completions(steps: Sequence[EditStep]) -> list[list[EditStep]]:
    """Batches, each together with the steps without facts behind it, which completed the run that it ended."""
    groups: list[list[EditStep]] = []
    for step in steps:
        if groups and step.completes and not groups[-1][0].completes:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def without_last(steps: Sequence[EditStep], count: int | None) -> list[EditStep]:
    """The steps without the last batches (None: without any), and without what completed a run with them.

    Raises:
        ConfigError: If the count is not a whole number from 0.
    """
    if count is not None and (isinstance(count, bool) or not isinstance(count, Integral) or count < 0):
        raise ConfigError(f"rollback takes a whole number of batches, at least 0, got {count!r}")
    groups = with_completions(steps)
    return [step for group in groups[: 0 if count is None else max(0, len(groups) - count)] for step in group]


def without_batch(steps: Sequence[EditStep], number: int) -> list[EditStep]:
    """The steps without one batch, and without what counted on it: completions behind it, facts of it taken back.

    Raises:
        ConfigError: If there is no such batch, or later ones went on learning from it.
    """
    numbers = [step.number for step in steps]
    if isinstance(number, bool) or not isinstance(number, Integral) or number not in numbers:
        raise ConfigError(
            f"no single batch {number!r} to take back; there are {', '.join(map(str, numbers)) or 'none'}"
        )
    place = numbers.index(int(number))
    learned = {each.place for each in steps[place].changes if not each.change.stands_alone}
    if later := [step.number for step in steps[place + 1 :] if learned & set(step.places)]:
        names = listed([*map(str, later)])
        raise ConfigError(
            f"batch {number} cannot be taken back alone: batches {names} went on learning where it ended, in "
            f"{listed(sorted(learned))}; take them back too (rollback of the last {len(steps) - place}), and "
            "edit their facts again"
        )
    rest = (step for step in steps[place + 1 :] if not step.completes and step.undoes != number)
    return [*steps[:place], *rest]


def out_of_force(steps: Sequence[EditStep]) -> list[set[str]]:
    """Return for each batch the hashes of its facts that were taken back, or replaced by a later batch's."""
    return force.out_of_force([(step.number, step.hashes, step.replaced) for step in steps], _undone(steps))


def facts_in_force(steps: Iterable[EditStep]) -> list[tuple[EditStep, int]]:
    """Return the facts that were neither taken back nor replaced: each with its batch and its place there."""
    steps = list(steps)
    gone = zip(steps, out_of_force(steps), strict=True)
    return [(step, i) for step, names in gone for i, each in enumerate(step.hashes) if each not in names]


def facts_on_record(steps: Iterable[EditStep]) -> list[tuple[EditStep, int]]:
    """Return the facts that were not taken back, replaced ones included: each with its batch and its place there."""
    steps = list(steps)
    undone = _undone(steps)
    return [(s, i) for s in steps for i, each in enumerate(s.hashes) if (s.number, each) not in undone]


def _undone(steps: Sequence[EditStep]) -> set[tuple[int, str]]:
    return {(step.undoes, each) for step in steps for each in step.undone}


def remaining(steps: Sequence[EditStep], count: int | None, batch: int | None) -> list[EditStep]:
    """The steps without the last batches, or without one batch; see ``Journal.rollback``.

    Raises:
        ConfigError: If both are given, or there is no such batch.
    """
    if batch is not None and count is not None:
        raise ConfigError(f"no single batch {batch} to take back together with the last {count}; give one of them")
    return without_last(steps, count) if batch is None else without_batch(steps, batch)


def warn_of_kept(before: Sequence[EditStep], rest: Sequence[EditStep]) -> None:
    """Warn of the facts of batches that were taken back which a later batch, still there, wrote again or replaced."""
    in_force, kept, replacing = facts_in_force(rest), dict[str, int](), dict[str, int]()
    for step in before:
        if step not in rest:
            later = [(s, i) for s, i in in_force if s.number > step.number]
            again = {s.hashes[i]: s.number for s, i in later}
            kept |= {step.name(i): again[name] for i, name in enumerate(step.hashes) if name in again}
            gone = set(step.hashes)
            others = [(s, i) for s, i in later if s.hashes[i] not in gone]
            replacing |= {s.name(i): s.number for s, i in others if gone.intersection(s.replaced.get(s.hashes[i], ()))}
    if replacing:
        warnings.warn(
            f"what a later batch ({listed([*{*replacing.values()}])}) wrote in the place of what was taken back stood "
            f"on it and may not hold any more: {listed([*replacing], 3)}; ask for these facts, or take that batch back",
            SharedKeyWarning,
            stacklevel=3,
        )
    if kept:
        warnings.warn(
            f"facts of what was taken back stay, because a later batch ({listed([*{*kept.values()}])}) wrote again: "
            f"{listed([*kept], 3)}; take that one back too, or undo the facts by name",
            RequestWarning,
            stacklevel=3,
        )


def hashes_on_record(steps: Iterable[EditStep]) -> set[str]:
    """Return the hashes of the facts that were not taken back: one that was edited again has one as well."""
    return {step.hashes[i] for step, i in facts_on_record(steps)}


def importance_at(steps: Iterable[EditStep], layer: int) -> Tensor | None:
    """Return the sum of the importance that batches found at a layer, d_out; None if there is none."""
    sums = [step.importance[layer].sum(0) for step in steps if layer in step.importance]
    return torch.stack(sums).sum(0) if sums else None


def request_hash(request: EditRequest) -> str:
    """SHA-256 of everything in a request."""
    return hashlib.sha256(canonical(request.to_dict())).hexdigest()
