"""What was done to the weights: applied batch by batch, whole or not at all, and taken back bit for bit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from cakeflow.data.request import EditRequest
from cakeflow.errors import ConfigError, LedgerError, ResumeError
from cakeflow.journal.ledger import Entry
from cakeflow.journal.provenance import circumstances
from cakeflow.journal.schema import FORMAT, ModelBody, RunBody
from cakeflow.journal.steps import EditStep, LayerStep, request_hash
from cakeflow.journal.store import JournalStore
from cakeflow.journal.weights import EditedWeights
from cakeflow.models.language import LanguageModel
from cakeflow.solvers.history import KeyHistory
from cakeflow.solvers.problem import LayerProblem, Update
from cakeflow.storage.atomic import uninterrupted

UNLIKE = "come out otherwise than recorded: another machine, library or number of threads; edit again there"


class Journal(Sequence[EditStep]):
    """The committed edit batches of one model, oldest first: nothing else changes its weights.

    ``sys.audit`` events named ``cakeflow.journal`` mark the moments at which a batch could fail.

    Attributes:
        steps: The batches.
        weights: What they did to the weights.
        record: Where all of it is kept on disk, if it is.
        pending: The batch that is being made, if one is.

    Args:
        lm: The model.
    """

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self.steps: list[EditStep] = []
        self.weights = EditedWeights(lm)
        self.record: JournalStore | None = None
        self.pending: EditStep | None = None
        self._history: dict[int, KeyHistory] = {}
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
        """Facts edited so far."""
        return sum(len(step.hashes) for step in self.steps)

    def history(self, layer: int) -> KeyHistory:
        """Keys of all committed batches at a layer."""
        return self._history.setdefault(layer, KeyHistory())

    def origin(self, layer: int) -> Tensor:
        """The weight before any edit, d_out x d_in."""
        return self.weights.origin(layer)

    @property
    def originals(self) -> dict[int, Tensor]:
        """Layer -> its weight before any edit, as the module has it."""
        return self.weights.originals

    @contextmanager
    def batch(self, requests: Sequence[EditRequest]) -> Iterator[EditStep]:
        """A batch in the making: committed as a whole when the body ends, taken back as a whole if it raises.

        When this returns, the batch is on disk if the journal is kept there.
        """
        step, known = EditStep(tuple(requests)), set(self.originals)
        self.pending = step
        try:
            yield step
            with uninterrupted():
                self._commit(step, known)
        except BaseException:
            if step.number < 0:
                with uninterrupted():
                    self._take_back(step, known)
            raise
        finally:
            self.pending = None

    def replay_next(self, requests: Sequence[EditRequest]) -> EditStep | None:
        """Do again what the interrupted run that is kept here did next, if that was a batch.

        Raises:
            ResumeError: If it was one of other requests, or does not lead to the same weights here.
        """
        step = self.record.next_step(tuple(map(request_hash, requests))) if self.record else None
        if step is not None:
            self._replay(step)
        return step

    @contextmanager
    def trial(self) -> Iterator[EditStep]:
        """A batch that is taken back when the body ends; for layers that no open batch wrote."""
        step = EditStep(())
        try:
            yield step
        finally:
            self._restore({part.layer for part in step.layers})

    def apply(self, step: EditStep, layer: int, problem: LayerProblem, update: Update) -> dict[str, float]:
        """Add an update to a layer's weight and note it in the step.

        Returns:
            Numbers to log: norms of the residual and of the update, alone and relative to the weight.

        Raises:
            NumericalError: If the edited weight is not finite.
        """
        norm, residual = update.norm(), float(problem.residual.norm(dim=1).mean())
        weight = float(torch.linalg.vector_norm(problem.weight, dtype=torch.float64))
        numbers = {"residual": residual, "update": norm, "relative_update": norm / weight}
        self._change(step, LayerStep(layer, problem.keys.cpu(), update.to("cpu"), numbers))
        return numbers

    def apply_deferred(self, step: EditStep) -> bool:
        """Put what is to be kept of each change in the change's place; whether there was any such change."""
        chosen = [index for index, part in enumerate(step.layers) if part.update.deferred is not None]
        for index in chosen:
            part = step.layers[index]
            self._restore({part.layer})
            kept = part.update.deferred
            assert kept is not None
            self.weights.add(part.layer, kept)
            numbers = part.numbers | {"update": kept.norm()}
            step.layers[index] = replace(part, update=kept, numbers=numbers)
        return bool(chosen)

    def finish(self, rule: Callable[[Tensor, Tensor], Tensor]) -> None:
        """End a run: a step without requests for the layers whose weight a rule changes.

        Args:
            rule: Takes a weight before any edit and now, d_out x d_in; gives what it becomes, or the latter as it is.
        """
        if self.replay_next(()):
            return
        changes: dict[int, Tensor] = {}
        for layer in sorted({part.layer for step in self.steps for part in step.layers}):
            now = self.weights.collected(layer)
            wanted = rule(self.origin(layer), now)
            if wanted is not now:
                changes[layer] = wanted.double() - now
        if changes:
            with self.batch(()) as step:
                for layer, change in changes.items():
                    update = Update(change.cpu())
                    self._change(step, LayerStep(layer, update.right[:0], update, {"update": update.norm()}))

    def rollback(self, steps: int | None = None, *, batch: int | None = None) -> None:
        """Take back the last ``steps`` batches (default: all), or one named batch; bit for bit.

        Args:
            steps: How many.
            batch: Number of one batch (``EditStep.number``): the weights become what they would be without its change,
                later ones, as they were found, put on top again.

        Raises:
            ConfigError: If there is no such batch, or both are given.
        """
        if batch is not None and (steps is not None or batch not in [step.number for step in self.steps]):
            known = ", ".join(str(step.number) for step in self.steps) or "none"
            raise ConfigError(f"no single batch {batch} to take back; there are {known}")
        kept = self.steps[: 0 if steps is None else max(0, len(self.steps) - steps)]
        if batch is not None:
            kept = [step for step in self.steps if step.number != batch]
        with uninterrupted():
            self._keep(kept)

    def _keep(self, kept: list[EditStep]) -> None:
        """Have only these steps left, in memory and on disk, or, if that fails, all that there are."""
        before, gone = self.steps, [step for step in self.steps if step not in kept]
        layers = {part.layer for step in gone for part in step.layers}
        afresh = kept != before[: len(kept)]  # later batches now stand on other weights
        try:
            self._become(kept, layers, afresh=afresh)
            sys.audit("cakeflow.journal", "rollback")
            if self.record and gone:
                hashes = {layer: self.weights.hash(layer) for layer in sorted(layers)}
                self.record.rollback([step.number for step in gone], hashes)
        except BaseException:
            self._become(before, layers, afresh=afresh)
            raise

    def _become(self, steps: list[EditStep], layers: set[int], *, afresh: bool = False) -> None:
        """The state after these steps; ``layers`` are those in which it differs from the present one."""
        self.steps = list(steps)
        self._restore(layers, afresh=afresh)
        self._history.clear()
        for step in self.steps:
            self._remember(step)

    def reverted(self) -> AbstractContextManager[None]:
        """The unedited model for a while; then the edited one again, bit for bit."""
        return self.weights.reverted()

    def save(self, folder: Path) -> None:
        """Write an account of all batches into a folder of its own.

        Raises:
            ConfigError: If there is one already.
        """
        record = JournalStore(folder)
        if record.tape:
            raise ConfigError(f"{folder} holds a journal already; choose another folder")
        self._tell(record)

    def open(self, record: JournalStore, run: Mapping[str, Any]) -> None:
        """Keep the journal in a folder from now on, batch by batch.

        What a folder holds of batches before its run is done again at once, the run's own by ``replay_next``.

        Args:
            record: Where.
            run: What decides the outcome of the run that begins.

        Raises:
            ResumeError: If the folder holds another run, or a finished one.
        """
        kinds = [entry.kind for entry in record.tape]
        if "end" in kinds or "rollback" in kinds:
            raise ResumeError(f"{record.folder} holds a finished run; start this one in another folder")
        if kinds and self.steps:
            raise ResumeError(f"{record.folder} holds a run; to go on with it, start with the unedited model")
        self.record = record
        self._tell(record)
        while record.tape and record.tape[0].kind == "batch":
            self._replay(record.read_step(record.tape.popleft()))
        if record.earlier != len(self.steps):
            raise ResumeError(
                f"{record.folder} was to go on from {record.earlier} earlier batches and has {len(self.steps)}: it was "
                "stopped while they were copied; edit those first, then start this run in another folder"
            )
        record.append(RunBody(**run, **circumstances(), format=FORMAT))

    def load(self, folder: Path) -> None:
        """Do again every batch that a folder tells of and that was not taken back; the journal is kept there from now.

        Raises:
            ResumeError: If there are edits already, the model is another one, or other weights come out here.
            LedgerError: If the account is broken, or there is none.
        """
        if self.steps:
            raise ResumeError(f"{len(self.steps)} batches were edited already; load into the unedited model")
        record = JournalStore(folder)
        if not record.tape:
            raise LedgerError(f"{folder} has no ledger; give the folder of a journal")
        record.append(ModelBody.model_validate(self.base))
        record.tape.clear()
        try:
            for entry in record.ledger.entries:
                self._again(record, entry)
        except BaseException:
            self._become([], set(self.originals))
            raise
        self.record = record

    def _again(self, record: JournalStore, entry: Entry) -> None:
        """Do again what an entry tells of."""
        if entry.kind == "batch":
            self._replay(record.read_step(entry))
        elif entry.kind == "rollback":
            gone, layers = record.taken_back(entry)
            self._become([step for step in self.steps if step.number not in gone], set(layers), afresh=True)
            self._check(layers, f"entry {entry.number}, rollback")

    @cached_property
    def base(self) -> dict[str, str]:
        """Which model this is: hash and type of its weights before any edit."""
        with self.reverted():
            return {"fingerprint": self.lm.fingerprint(), "dtype": str(self.lm.dtype)}

    def _tell(self, record: JournalStore) -> None:
        """Tell a record what was done so far."""
        record.append(ModelBody(**self.base, earlier=len(self.steps)))
        known: set[int] = set()
        for step in self.steps:
            layers = {part.layer for part in step.layers} - known
            record.commit(step, step.number, {layer: self.originals[layer] for layer in layers})
            known |= layers

    def _commit(self, step: EditStep, known: set[int]) -> None:
        """Settle a batch; whatever can fail comes before the record's last word."""
        sys.audit("cakeflow.journal", "commit")
        for part in step.layers:
            step.after[part.layer] = self.weights.hash(part.layer)
        self._remember(step)
        sys.audit("cakeflow.journal", "remembered")
        if self.record:
            fresh = {layer: tensor for layer, tensor in self.originals.items() if layer not in known}
            self.record.commit(step, self._count, fresh)
        step.number = self._count
        self._count += 1
        self.steps.append(step)

    def _take_back(self, step: EditStep, known: set[int]) -> None:
        """Undo what a batch that failed did until then."""
        self._become(self.steps, {part.layer for part in step.layers})
        for layer in set(self.originals) - known:
            self.weights.forget(layer)

    def _replay(self, step: EditStep) -> None:
        """Do a recorded batch again, or nothing of it."""
        known = set(self.originals)
        try:
            for part in step.layers:
                self.weights.add(part.layer, part.update)
            self._check(step.after, f"batch {step.number}")
            self._remember(step)
        except BaseException:
            with uninterrupted():
                self._take_back(step, known)
            raise
        self.steps.append(step)
        self._count = max(self._count, step.number + 1)

    def _check(self, hashes: Mapping[int, str], what: str) -> None:
        differing = [layer for layer, told in hashes.items() if self.weights.hash(layer) != told]
        if differing:
            raise ResumeError(f"{what}: the weights of layers {differing} {UNLIKE}")

    def _remember(self, step: EditStep) -> None:
        """Add a step's keys to the histories; those at a run's end have none."""
        for part in step.layers:
            if len(part.keys):
                self.history(part.layer).append(part.keys.to(self.lm.device))

    def _change(self, step: EditStep, part: LayerStep) -> None:
        """Note a layer's change in a batch, then make it."""
        step.before[part.layer] = self.weights.hash(part.layer)
        step.layers.append(part)
        sys.audit("cakeflow.journal", f"layer {part.layer}")
        self.weights.add(part.layer, part.update)
        sys.audit("cakeflow.journal", f"layer {part.layer} changed")

    def _restore(self, layers: set[int], *, afresh: bool = False) -> None:
        """The weights of ``layers`` as they are after all steps: originals, then the same additions.

        ``afresh`` takes the steps' hashes again.
        """
        for layer in layers:
            self.weights.restore(layer)
        for step in self.steps:
            for part in step.layers:
                if part.layer in layers:
                    before = self.weights.hash(part.layer) if afresh else ""
                    self.weights.add(part.layer, part.update)
                    if afresh:
                        step.before[part.layer], step.after[part.layer] = before, self.weights.hash(part.layer)
