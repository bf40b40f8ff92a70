"""A journal's folder: the ledger, the original content of edited places, and the tensors of each batch."""

from __future__ import annotations

import sys
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cakeflow.data.request import EditRequest
from cakeflow.data.schemas import parse_requests
from cakeflow.errors import LedgerError, RequestError, ResumeError
from cakeflow.journal.changes import kind_of
from cakeflow.journal.ledger import Entry, Ledger, bodies
from cakeflow.journal.provenance import circumstances
from cakeflow.journal.schema import (
    BatchBody,
    ChangeBody,
    Circumstances,
    EndBody,
    EvaluationBody,
    ModelBody,
    RollbackBody,
    RunBody,
)
from cakeflow.journal.steps import AppliedChange, EditStep, request_hash
from cakeflow.ranks import on_first
from cakeflow.storage.atomic import write_tensors
from cakeflow.storage.folders import require_inside
from cakeflow.storage.hashing import file_hash
from cakeflow.storage.locks import locked
from cakeflow.storage.tensors import read_tensors
from cakeflow.storage.typed import Schema

JOURNAL, LEDGER, ANSWERS = "journal", "ledger.jsonl", "answers.jsonl"
"""Names in a run folder: the journal's folder, the ledger in it, and what the model answered freely."""
INCIDENTAL = ("earlier", "format", "method", *Circumstances.model_fields)
"""Fields of the first entries that may differ when a run goes on."""
FROM_A_COPY = "take it from a copy"


def ledger_path(run: Path) -> Path:
    """Return the place of the ledger in a run folder, where one may be."""
    return run / JOURNAL / LEDGER


class JournalStore:
    """The folder of one journal; what it was given is on disk when a method returns. Of several ranks the first has it.

    If the folder holds an interrupted run, its entries are ``recorded``: what comes is compared with them rather than
    written again, until they are used up.

    Args:
        folder: The folder.
        texts: Whether the texts of requests are stored; their hashes always are.
        place: Layer -> name of the weight that format 1 meant by it.

    Raises:
        LedgerError: If the ledger is broken.
    """

    def __init__(self, folder: Path, *, texts: bool = True, place: Callable[[int], str] = "layer {}".format) -> None:
        self.folder, self.texts, self.place = folder, texts, place
        self.ledger = Ledger(folder / LEDGER, place)
        self.recorded = deque(entry for entry in self.ledger.entries if entry.kind != "policy")

    def append(self, body: Schema) -> None:
        """Append an entry; while a run goes on, compare it with the recorded one instead.

        Raises:
            ResumeError: If they differ in anything that decides results.
        """
        if not isinstance(body, EvaluationBody):
            self._pass_evaluations()
        if not self.recorded:
            self.ledger.append(body)
        elif isinstance(body, EndBody) and not isinstance(self.recorded[0].body, EndBody):
            raise ResumeError(f"{self.folder} has more of this run than was repeated; start it in another folder")
        elif type(self.recorded[0].body) is type(body):
            previous = self.recorded.popleft().body
            if isinstance(body, (ModelBody, RunBody)):
                self._require_like(previous, body)
            if isinstance(previous, RunBody) and isinstance(body, RunBody):
                self._warn_of_versions(previous.versions, body.versions)

    def require_run(self, run: RunBody) -> None:
        """Check that the run which the folder has, if it has one, is this one; ``ResumeError`` as in ``append``."""
        for recorded in bodies(self.recorded, RunBody)[:1]:
            self._require_like(recorded, run)

    @property
    def ended(self) -> str:
        """Why the run that the folder has cannot go on: it is ``finished`` or ``rolled-back``; empty if it can."""
        kinds = [entry.kind for entry in self.recorded]
        own = bodies(list(self.recorded)[kinds.index("run") :], BatchBody) if "run" in kinds else []
        is_reduced = "rollback" in kinds or any(body.undoes is not None for body in own)
        return "finished" if "end" in kinds else "rolled-back" if is_reduced else ""

    def goes_on_without(self, requests: Sequence[EditRequest]) -> bool:
        """Return whether the recorded run goes on with another batch than that of these requests."""
        body = next((entry.body for entry in self.recorded if entry.kind != "evaluation"), None)
        return isinstance(body, BatchBody) and list(body.hashes) != [request_hash(each) for each in requests]

    def note(self, body: Schema) -> None:
        """Append an entry that is no part of what a run repeats when it goes on."""
        self.ledger.append(body)

    def _require_like(self, recorded: Schema, now: Schema) -> None:
        """Compare what decides results of a model or run."""
        old, new = ({k: v for k, v in each.to_dict().items() if k not in INCIDENTAL} for each in (recorded, now))
        self._require_same(old, new)

    def _require_same(self, recorded: Any, now: Any) -> None:
        if lines := differences(recorded, now):
            raise ResumeError(
                f"{self.folder} holds a run that differs from this one: {'; '.join(lines)}; restore that, or start "
                "a run of its own in another folder"
            )

    def _warn_of_versions(self, recorded: Mapping[str, str], now: Mapping[str, str]) -> None:
        if lines := differences(recorded, now):
            warnings.warn(
                f"{self.folder} holds a run of other versions: {'; '.join(lines)}; the weights may differ in the last "
                "bits from those of a run without interruption",
                stacklevel=2,
            )

    def next_step(self, hashes: Sequence[str], inputs: Mapping[str, str]) -> EditStep | None:
        """The next recorded batch, if the recorded run goes on with one.

        Args:
            hashes: SHA-256 of each request.
            inputs: What the batch would be solved with now (``EditStep.inputs``).

        Raises:
            ResumeError: If it has other requests, or was solved with something else.
        """
        body = next((entry.body for entry in self.recorded if entry.kind != "evaluation"), None)
        if not isinstance(body, BatchBody) or (body.hashes and not hashes):
            return None
        self._pass_evaluations()
        step = self.read_step(self.recorded.popleft())
        if list(step.hashes) != list(hashes):
            raise ResumeError(f"{self.folder}: the next recorded batch, {step.number}, has other requests than these")
        self._require_same(step.inputs, dict(inputs))
        return step

    def commit(self, step: EditStep, number: int, originals: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write a batch, and the originals of places that were not edited before; all of it or nothing.

        Raises:
            ResumeError: If batches of the interrupted run have not been repeated yet.
            LedgerError: If another process has continued the ledger meanwhile.
            LockedError: If another process is writing it.
        """
        self._require_all_repeated()
        self.ledger.take(on_first(lambda: self._commit_locked(step, number, originals)))

    def _commit_locked(self, step: EditStep, number: int, originals: Mapping[str, Mapping[str, Tensor]]) -> Entry:
        with locked(self.ledger.path):
            self.ledger.require_unchanged()  # before files of the same names are written
            self._commit(step, number, originals)
        return self.ledger.entries[-1]

    def _commit(self, step: EditStep, number: int, originals: Mapping[str, Mapping[str, Tensor]]) -> None:
        names = [f"batch-{number:05d}.safetensors"]
        try:
            write_tensors(self.folder / names[0], _tensors(step))
            for tensors in filter(None, originals.values()):
                names.append(f"original-{number:05d}-{len(names) - 1}.safetensors")
                write_tensors(self.folder / names[-1], tensors)
            files = {name: file_hash(self.folder / name) for name in names}
            self.ledger.append(_body(step, number, files, texts=self.texts))
            sys.audit("cakeflow.files", "committed", names[0])
        except BaseException:
            if not self.has_batch(number):
                for name in names:
                    (self.folder / name).unlink(missing_ok=True)
            raise

    def rollback(self, batches: Sequence[int], hashes: Mapping[str, str]) -> None:
        """Write that batches were taken back; ``hashes`` are those of the places that changed by it."""
        self._require_all_repeated()
        self.ledger.append(RollbackBody(batches=list(batches), places=dict(hashes), **circumstances().to_dict()))

    @property
    def earlier(self) -> int:
        """Number of batches of earlier runs at the beginning of the ledger."""
        body = self.ledger.entries[0].body
        return body.earlier if isinstance(body, ModelBody) else 0

    def has_batch(self, number: int) -> bool:
        """True if the ledger ends with this batch: it is committed, whatever came after that."""
        last = self._last_body()
        return isinstance(last, BatchBody) and last.batch == number

    def has_rollback(self, batches: Sequence[int]) -> bool:
        """True if the ledger ends with the rollback of these batches."""
        last = self._last_body()
        return isinstance(last, RollbackBody) and last.batches == list(batches)

    def _last_body(self) -> Schema | None:
        """What the ledger on disk ends with."""
        if (entry := on_first(self.ledger.settled)) is None:
            return None
        self.ledger.take(entry)
        return entry.body

    def _pass_evaluations(self) -> None:
        """Leave out recorded evaluations that do not take place now."""
        while self.recorded and self.recorded[0].kind == "evaluation":
            self.recorded.popleft()

    def _require_all_repeated(self) -> None:
        self._pass_evaluations()
        if self.recorded:
            raise ResumeError(
                f"{self.folder} holds {sum(e.kind == 'batch' for e in self.recorded)} batches that were not repeated "
                "yet; let the interrupted run go on to its end first"
            )

    def read_step(self, entry: Entry) -> EditStep:
        """A batch as it was committed.

        Raises:
            LedgerError: If a file is not the one that was written, or its content does not fit the entry.
        """
        return on_first(lambda: self._read_step(entry))

    def _read_step(self, entry: Entry) -> EditStep:
        body = entry.body
        if not isinstance(body, BatchBody):
            raise LedgerError(f"{self._where(entry)} is a {entry.kind}, not a batch; {FROM_A_COPY}")
        tensors = self.read(entry, f"batch-{body.batch:05d}.safetensors")
        try:
            return _step(body, tensors)
        except LedgerError:  # a ValueError too, with a remedy of its own: the kind of a change is not known
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, RequestError) as error:
            raise LedgerError(
                f"{self._where(entry)}: the batch does not fit its file ({error}); {FROM_A_COPY}"
            ) from error

    def originals(self, entry: Entry) -> dict[str, Tensor]:
        """The originals that were written together with a batch, by name.

        Raises:
            LedgerError: As ``read``.
        """
        files = entry.body.files if isinstance(entry.body, BatchBody) else {}
        names = [name for name in sorted(files) if name.startswith("original-")]
        tensors = {name: each for file in names for name, each in self.read(entry, file).items()}
        return {self.place(int(name)) if name.isdigit() else name: each for name, each in tensors.items()}  # format 1

    def read(self, entry: Entry, name: str) -> dict[str, Tensor]:
        """A file of tensors that an entry names.

        Raises:
            LedgerError: If it is missing, is not the one that was written, or lies elsewhere.
        """
        path, where = self.folder / name, self._where(entry)
        files: Mapping[str, str] = getattr(entry.body, "files", {})
        if Path(name).name != name:
            raise LedgerError(f"{where}: {name!r} is not a file name; a ledger may not name files outside its folder")
        if not require_inside(path, self.folder).is_file():
            raise LedgerError(f"{where}: {name} is missing; {FROM_A_COPY}")
        return read_tensors(path, f"{where}: {name}", LedgerError, FROM_A_COPY, files.get(name, "")).tensors

    def _where(self, entry: Entry) -> str:
        return f"{self.folder / LEDGER}, entry {entry.number}"


def differences(recorded: Any, now: Any, name: str = "") -> list[str]:
    """Return the differences between two bodies, or parts of them, in words: ``NAME was X, is Y``.

    Args:
        recorded: Plain data, as it was.
        now: The same as it is.
        name: What they are called in the words.
    """
    if isinstance(recorded, dict) and isinstance(now, dict):
        names = {**recorded, **now}
        pairs = [(f"{name}.{part}" if name else part, recorded.get(part), now.get(part)) for part in names]
        return [line for label, one, other in pairs for line in differences(one, other, label)]
    if recorded == now:
        return []
    signs = enumerate(zip(str(recorded), str(now), strict=False))
    start = max(0, next((place for place, (old, new) in signs if old != new), 0) - 40)
    return [f"{name} was {_short(recorded, start)}, is {_short(now, start)}"]


def _short(value: object, start: int) -> str:
    """A long value around the place from where on it differs."""
    text = str(value)
    return text if len(text) <= 100 else f"{'...' if start else ''}{text[start : start + 94]}..."


def _tensors(step: EditStep) -> dict[str, Tensor]:
    """The tensors of a batch: target values and importance by layer, each change's own by its number and place."""
    tensors = {f"target/{layer}": values for layer, values in step.values.items()}
    tensors |= {f"importance/{layer}": each for layer, each in step.importance.items()}
    for index, part in enumerate(step.changes):
        tensors |= {f"{_prefix(index, part.place)}/{name}": each for name, each in part.change.tensors().items()}
    return tensors


def _prefix(index: int, place: str) -> str:
    return f"{index}/{place}"


def _body(step: EditStep, number: int, files: dict[str, str], *, texts: bool) -> BatchBody:
    changes = [
        ChangeBody(
            place=part.place,
            kind=type(part.change).__name__,
            numbers=part.numbers,
            before=step.before[part.place],
            after=step.after[part.place],
            prefix=_prefix(index, part.place),
        )
        for index, part in enumerate(step.changes)
    ]
    requests = {"requests": [request.to_dict() for request in step.requests]} if texts else {}
    return BatchBody(
        batch=number,
        files=files,
        hashes=list(step.hashes),
        targets=step.targets,
        facts=step.facts,
        owners=step.owners,
        undone=list(step.undone),
        undoes=step.undoes if step.undone else None,
        replaced=step.replaced,
        who=circumstances().who if step.undone else "",
        numbers=step.numbers,
        changes=changes,
        inputs=step.inputs,
        **requests,
    )


def _step(body: BatchBody, tensors: Mapping[str, Tensor]) -> EditStep:
    whole = {name: each for name, each in tensors.items() if name.count("/") == 1}  # a change may have a "target" too
    values = {_layer_of(name): each for name, each in whole.items() if "target" in name.split("/")}
    importance = {_layer_of(name): each for name, each in tensors.items() if name.startswith("importance/")}
    rows = [*values.values(), *importance.values()]
    if not all(each.dim() == 2 and each.is_floating_point() and torch.isfinite(each).all() for each in rows):
        raise LedgerError(f"batch {body.batch}: target values or importance are not finite matrices; {FROM_A_COPY}")
    if max(body.owners, default=-1) >= len(body.hashes):
        raise LedgerError(f"batch {body.batch}: a key belongs to request {max(body.owners)} of {len(body.hashes)}")
    if unknown := set(body.replaced) - set(body.hashes):
        raise LedgerError(f"batch {body.batch}: {min(unknown)[:16]} replaced earlier facts and is none of the batch")
    return EditStep(
        requests=tuple(parse_requests(body.requests)) if body.requests else (),
        changes=[AppliedChange(_change(part, tensors), dict(part.numbers)) for part in body.changes],
        targets=list(body.targets),
        facts=list(body.facts),
        owners=list(body.owners),
        undone=tuple(body.undone),
        undoes=-1 if body.undoes is None else body.undoes,
        replaced=dict(body.replaced),
        values=values,
        importance=importance,
        numbers=dict(body.numbers),
        hashes=tuple(body.hashes),
        before={part.place: part.before for part in reversed(body.changes)},
        after={part.place: part.after for part in body.changes},
        inputs=dict(body.inputs),
        number=body.batch,
    )


def _change(body: ChangeBody, tensors: Mapping[str, Tensor]) -> Any:
    stem = f"{body.prefix or body.place}/"
    own = {name.removeprefix(stem): each for name, each in tensors.items() if name.startswith(stem)}
    return kind_of(body.kind).from_tensors(body.place, own)


def _layer_of(name: str) -> int:
    """Layer of target values or importance: ``target/5``, or ``5/target`` in format 1."""
    first, second = name.split("/")
    return int(first if second == "target" else second)
