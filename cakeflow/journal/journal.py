"""Every change that was made to a model: applied batch by batch, whole or not at all, and undone bit for bit."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import overload

from torch import Tensor

from cakeflow import ranks
from cakeflow.data.request import EditRequest
from cakeflow.errors import ConfigError, LedgerError, ResumeError
from cakeflow.journal.changes import Change
from cakeflow.journal.histories import Histories
from cakeflow.journal.ledger import Entry
from cakeflow.journal.model_state import ModelState
from cakeflow.journal.places import EditedPlaces
from cakeflow.journal.policy import Policies
from cakeflow.journal.schema import FORMAT, BatchBody, EndBody, ModelBody, RollbackBody, RunBody
from cakeflow.journal.steps import AppliedChange, EditStep, facts_in_force, remaining, request_hash, warn_of_kept
from cakeflow.journal.store import JournalStore
from cakeflow.models.architecture import Site
from cakeflow.models.base import EditableModel
from cakeflow.solvers.history import KeyHistory
from cakeflow.storage.atomic import uninterrupted


class Journal(Sequence[EditStep]):
    """The committed edit batches of one model, oldest first; nothing else changes the model.

    ``sys.audit`` events named ``cakeflow.journal`` mark the moments at which a batch could fail.

    Attributes:
        model: The model.
        steps: The batches.
        places: The edited places.
        store: The journal's folder on disk, if it has one.
        pending: The batch that is being made, if there is one.
        memory: Hashes of the model in memory.
        policies: The policies that it obeys.
        histories: Keys of its batches by place.
        inputs: Name -> SHA-256 of what batches are solved with; with the policies' hash, ``EditStep.inputs``.

    Args:
        model: The model.
        texts: Whether the texts of requests are stored in folders; their hashes always are.
    """

    def __init__(self, model: EditableModel, *, texts: bool = True) -> None:
        self.model, self.texts = model, texts
        self.policies = Policies(self)
        self.inputs: dict[str, str] = {}
        self.steps: list[EditStep] = []
        self.places = EditedPlaces(model)
        self.store: JournalStore | None = None
        self.pending: EditStep | None = None
        self.memory = ModelState(model, self.places.first)
        self.histories = Histories(model)
        self._count = 0

    @overload
    def __getitem__(self, index: int) -> EditStep: ...
    @overload
    def __getitem__(self, index: slice) -> list[EditStep]: ...
    def __getitem__(self, index: int | slice) -> EditStep | list[EditStep]:
        return self.steps[index]

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def edits(self) -> int:
        """Number of facts that are in force, each counted once."""
        return len({step.hashes[i] for step, i in facts_in_force(self.steps)})

    @property
    def changes(self) -> list[Change]:
        """The changes that are in force, oldest first."""
        return [part.change for step in self.steps for part in step.changes]

    def history(self, place: str) -> KeyHistory:
        """Keys of the facts in force at a place."""
        return self.histories.at(place)

    def original(self, place: str) -> dict[str, Tensor]:
        """Tensors that a place held before any edit; empty if it was not edited."""
        return self.places.original(place)

    def state(self) -> dict[str, Tensor]:
        """The model's tensors at all edited places, by their names in its state dict."""
        return self.places.state()

    # ---- making a batch ----

    @contextmanager
    def batch(self, requests: Sequence[EditRequest], undone: Sequence[str] = (), of: int = -1) -> Iterator[EditStep]:
        """Make a batch: it is committed as a whole when the body ends, and undone as a whole if the body raises.

        When this returns, the batch is on disk if the journal has a folder. ``memory.require_ready`` comes first.
        With ``undone``, hashes of facts of the batch ``of``, it takes these back. ``PolicyError``: a policy forbids it.
        """
        self.memory.require_ready("a batch", busy=self.pending is not None)
        if self.policies.rules:
            ranks.on_first(lambda: self.policies.require(requests))
        known, number = set(self.places.originals), self._count
        step = EditStep(tuple(requests), inputs=self.inputs | self.policies.inputs, undone=(*undone,), undoes=of)
        self.pending = step
        try:
            yield step
            with uninterrupted():
                self._commit(step, number)
        except BaseException as error:
            if step.number < 0:
                with nullcontext() if ranks.rejoin(error) else ranks.alone(), uninterrupted():
                    self._settle(step, number, known)
            raise
        finally:
            self.pending = None

    @contextmanager
    def trial(self) -> Iterator[EditStep]:
        """Make a batch that is undone when the body ends; for places that no open batch has changed."""
        step, known = EditStep(()), set(self.places.originals)
        try:
            yield step
        finally:
            self.places.restore(set(step.places), self.steps)
            self.places.forget_all_but(known)

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Take back, when the body ends, every batch that it makes; nothing is stored, and no number is used up."""
        store, count, before, self.store = self.store, self._count, list(self.steps), None
        try:
            yield
        finally:
            with uninterrupted():
                self._reduce_to(before)
                self.store, self._count = store, count

    def apply(self, step: EditStep, change: Change, numbers: dict[str, float]) -> None:
        """Make a change as a part of the open batch; ``numbers`` is what is logged of it.

        Raises:
            ConfigError: If another place that was edited lies inside this one, or around it.
            NumericalError: If the place does not hold finite numbers afterwards.
        """
        self.places.touch(change)
        if change.place not in step.before:
            self.memory.check([change.place])
            step.before[change.place] = change.hash(self.model)
        step.changes.append(AppliedChange(change, numbers))
        sys.audit("cakeflow.journal", f"change {change.place}")
        change.apply(self.model)
        sys.audit("cakeflow.journal", f"changed {change.place}")

    def drop(self, step: EditStep, count: int) -> None:
        """Take back the changes of the open batch but the first ``count``."""
        places = {part.place for part in step.changes[count:]}
        del step.changes[count:]
        self.places.restore(places, [*self.steps, step])

    def replace(self, step: EditStep, index: int, change: Change, numbers: dict[str, float]) -> None:
        """Put another change in the place of one that the open batch has made."""
        step.changes[index] = AppliedChange(change, numbers)
        self.places.restore({change.place}, [*self.steps, step])

    def replay_next(self, requests: Sequence[EditRequest]) -> EditStep | None:
        """Repeat the next batch of the interrupted run in the journal's folder, if it goes on with one.

        Raises:
            ResumeError: If that batch has other requests or inputs, or does not lead to the recorded weights.
        """
        if self.policies.rules:
            ranks.on_first(lambda: self.policies.require(requests))
        inputs, hashes = self.inputs | self.policies.inputs, tuple(map(request_hash, requests))
        step = self.store.next_step(hashes, inputs) if self.store else None
        if step is not None:
            self._replay(step)
        return step

    def rollback(self, steps: int | None = None, *, batch: int | None = None) -> None:
        """Take back the last ``steps`` batches (default: all), or one named batch; bit for bit.

        What a solver did to complete a run behind them, such as PRUNE's damping, counted on them and goes too. Warnings
        name facts that another batch wrote as well, which stay, and those that a later batch replaced.

        Args:
            steps: How many; all, if there are fewer.
            batch: Number of one batch: the model becomes what it would be without it, with the later ones on top.

        Raises:
            ConfigError: If there is no such batch, both are given, or one is no whole number from 0.
            ModelChangedError: If the model is not as the journal left it.
        """
        self.memory.require_ready("a rollback", busy=self.pending is not None, everything=True)
        rest, before = remaining(self.steps, steps, batch), self.steps
        with uninterrupted():
            self._reduce_to(rest)
        warn_of_kept(before, self.steps)

    def _reduce_to(self, rest: list[EditStep]) -> None:
        """Have only these steps, in memory and on disk, or, if that fails, all that there are."""
        before, removed = self.steps, [step for step in self.steps if step not in rest]
        places = {place for step in removed for place in step.places}
        rehash = rest != before[: len(rest)]  # later batches now stand on other weights
        try:
            self._become(rest, places, rehash=rehash)
            sys.audit("cakeflow.journal", "rollback")
            if self.store and removed:
                hashes = self.places.hashes(sorted(places))
                self.store.rollback([step.number for step in removed], hashes)
        except BaseException:
            if not (self.store and self.store.has_rollback([step.number for step in removed])):
                self._become(before, places, rehash=rehash)
            raise

    @contextmanager
    def reverted(self, steps: Sequence[EditStep] = ()) -> Iterator[None]:
        """Give the model its original places, with these steps only; on exit the edited ones return, bit for bit."""
        edited = self.places.read()
        try:
            self.places.restore(set(self.places.originals), steps)
            with self.memory.reverting():
                yield
        finally:
            self.places.put(edited)

    # ---- the folder on disk ----

    @cached_property
    def base(self) -> ModelBody:
        """Hash and type of the unedited model."""
        with self.reverted():
            return ModelBody(fingerprint=self.model.fingerprint(), dtype=str(self.model.dtype), format=FORMAT)

    def open(self, store: JournalStore, run: RunBody) -> None:
        """Store every batch in a folder from now on; an interrupted run of the same experiment there goes on.

        Batches of earlier runs that the folder has are repeated at once, the run's own by ``replay_next``.

        Args:
            store: The folder.
            run: Everything that decides the outcome of the run that begins.

        Raises:
            ResumeError: If the folder has another run, or a finished one.
        """
        if store.ended:
            raise ResumeError(f"{store.folder} holds a {store.ended} run; start this one in another folder")
        if store.recorded and self.steps:
            raise ResumeError(f"{store.folder} holds a run; to go on with it, start with the unedited model")
        self.policies.require_same(store.ledger.entries)
        store.require_run(run)  # before earlier batches change the model
        self._write_all(store)
        with self._repeating():
            while store.recorded and store.recorded[0].kind == "batch":
                self.policies.require_recorded([store.recorded[0]])
                self._replay(store.read_step(store.recorded.popleft()))
            if store.earlier != len(self.steps):
                raise ResumeError(
                    f"{store.folder} was to go on from {store.earlier} earlier batches and has {len(self.steps)}: it "
                    "was stopped while they were copied; edit those first, then start this run in another folder"
                )
            store.append(run)
        self.store = store

    def close(self, files: Mapping[str, str]) -> None:
        """Mark the run in the folder as complete; ``files`` are its other files and their hashes."""
        if self.store:
            self.store.append(EndBody(files=dict(files)))

    def save(self, folder: Path) -> None:
        """Write all batches into a new folder. ``ConfigError``: there is a journal already."""
        store = self.store_at(folder)
        if store.recorded:
            raise ConfigError(f"{folder} holds a journal already; choose another folder")
        self._write_all(store)

    def load(self, folder: Path, *, judged: bool = True) -> None:
        """Repeat every batch of a folder that was not taken back; the journal is stored there from now on.

        Args:
            folder: The folder.
            judged: Whether to refuse a run that its policy has not judged, or that breaks a policy of this journal.

        Raises:
            ResumeError: If there are edits already, the model is another one, or other weights come out here.
            LedgerError: If the ledger is broken, or there is none.
            PolicyError: If a policy forbids it.
        """
        self.memory.require_ready("loading", busy=self.pending is not None, everything=True)
        if self.steps:
            raise ResumeError(f"{len(self.steps)} batches were edited already; load into the unedited model")
        store = self.store_at(folder)
        if not store.recorded:
            raise LedgerError(f"{folder} has no ledger; give the folder of a journal")
        store.append(self.base)
        store.recorded.clear()
        self.policies.require_recorded(store.ledger.entries if judged else ())
        with self._repeating():
            for entry in store.ledger.entries:
                self._repeat(store, entry)
            self.policies.require_judged(store.ledger.entries if judged else ())
        self.store = store

    def copied_to(self, model: EditableModel) -> Journal:
        """Return a journal of another copy of the unedited model, which gets the same batches."""
        other = Journal(model, texts=self.texts)
        other.policies, other.store = self.policies, self.store
        for step in self.steps:
            other._replay(step)
        return other

    def store_at(self, folder: Path) -> JournalStore:
        """A folder for this journal; by a layer's number, format 1 meant the down projection of its MLP."""
        return JournalStore(
            folder, texts=self.texts, place=lambda layer: self.model.weight_name(Site(layer, "mlp_out"))
        )

    def _repeat(self, store: JournalStore, entry: Entry) -> None:
        if isinstance(entry.body, BatchBody):
            self._replay(store.read_step(entry))
        elif isinstance(entry.body, RollbackBody):
            removed = entry.body.batches
            rest = [step for step in self.steps if step.number not in removed]
            self._become(rest, set(entry.body.places) & set(self.places.originals), rehash=True)
            self.places.require(entry.body.places, f"entry {entry.number}, rollback")

    def _write_all(self, store: JournalStore) -> None:
        """Write the batches so far."""
        store.append(self.base.model_copy(update={"earlier": len(self.steps)}))
        known: set[str] = set()
        for step in self.steps:
            fresh = {place: self.original(place) for place in step.places if place not in known}
            store.commit(step, step.number, fresh)
            known.update(fresh)

    def _commit(self, step: EditStep, number: int) -> None:
        """Complete a batch; whatever can fail comes before the ledger's line."""
        sys.audit("cakeflow.journal", "commit")
        step.after.update(self.places.hashes(step.places))
        self.histories.add(step, self.steps)
        sys.audit("cakeflow.journal", "remembered")
        ranks.agree(step.after, "weights after the batch")  # the last that can fail on another rank than the first
        if self.store:
            fresh = {p: self.original(p) for p in step.places if all(p not in each.places for each in self.steps)}
            self.store.commit(step, number, fresh)
        self._note(step, number)

    def _note(self, step: EditStep, number: int) -> None:
        """Have a batch that is committed; called again, nothing changes."""
        if step not in self.steps:
            self.steps.append(step)
        self._count = number + 1
        step.number = number
        self.memory.record(step.after)

    def _settle(self, step: EditStep, number: int, known: set[str]) -> None:
        """After an exception, agree with the disk: note a batch that is committed there, undo any other."""
        if self.store and self.store.has_batch(number):
            self._note(step, number)
        else:
            self._become([each for each in self.steps if each is not step], set(step.places))
            self.places.forget_all_but(known)

    @contextmanager
    def _repeating(self) -> Iterator[None]:
        """Have what the body repeats or, if that fails, the batches of before."""
        before, known = [*self.steps], set(self.places.originals)
        try:
            yield
        except BaseException:
            with uninterrupted():
                self._become(before, set(self.places.originals))
                self.places.forget_all_but(known)
            raise

    def _replay(self, step: EditStep) -> None:
        """Repeat a recorded batch, or nothing of it."""
        with self._repeating():
            for part in step.changes:
                self.places.touch(part.change)
                part.change.apply(self.model)
            self.places.require(step.after, f"batch {step.number}")
            self.histories.add(step, self.steps)
        self.steps.append(step)
        self.memory.record(step.after)
        self._count = max(self._count, step.number + 1)

    def _become(self, steps: list[EditStep], places: set[str], *, rehash: bool = False) -> None:
        """Have the state after these steps; it differs from the present one in ``places``."""
        self.steps = list(steps)
        self.places.restore(places, self.steps, rehash=rehash)
        self.memory.record(self.places.hashes(places))
        self.histories.rebuild(self.steps)
