"""A journal on disk: a ledger, the originals of the weights, and each batch's keys and factors."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cakeflow.data.schemas import parse_requests
from cakeflow.errors import EditError, LedgerError, ResumeError
from cakeflow.journal.ledger import Entry, Ledger
from cakeflow.journal.provenance import circumstances
from cakeflow.journal.schema import BatchBody, ChangeBody, EndBody, ModelBody, RollbackBody, RunBody, Schema, TargetBody
from cakeflow.journal.steps import EditStep, LayerStep
from cakeflow.solvers.problem import Update
from cakeflow.storage.atomic import write_tensors
from cakeflow.storage.hashing import digest

LEDGER = "ledger.jsonl"


INCIDENTAL = ("who", "versions", "threads", "earlier", "format")
"""What may differ when a run goes on."""


FROM_A_COPY = "take it from a copy"


class JournalStore:
    """The account of one journal in a folder; what it was told is on disk when it returns.

    A folder that holds an account already is taken up: ``tape`` are the entries of the interrupted run, which are
    compared with what comes rather than written again.

    Args:
        folder: Where it lies.
        texts: Whether the texts of requests are kept; their hashes always are.

    Raises:
        LedgerError: If the account is broken.
    """

    def __init__(self, folder: Path, *, texts: bool = True) -> None:
        self.folder, self.texts = folder, texts
        self.ledger = Ledger(folder / LEDGER)
        self.tape = deque(entry for entry in self.ledger.entries if entry.kind != "policy")

    def append(self, body: Schema) -> None:
        """Write an entry, unless it comes next on the tape: then it must say the same of what matters.

        Raises:
            ResumeError: If it does not.
        """
        if not self.tape:
            self.ledger.append(body)
        elif type(self.tape[0].body) is type(body):
            previous = self.tape.popleft().body
            differing = list(_differences(previous.to_dict(), body.to_dict()))
            if differing and isinstance(body, (ModelBody, RunBody)):
                raise ResumeError(
                    f"{self.folder} holds a run that differs from this one: {'; '.join(differing)}; restore that, or "
                    "start a run of its own in another folder"
                )

    def next_step(self, hashes: Sequence[str]) -> EditStep | None:
        """The batch that comes next on the tape.

        Raises:
            ResumeError: If it is another one than that of these requests.
        """
        while self.tape and self.tape[0].kind == "evaluation":
            self.tape.popleft()  # one that does not take place now
        body = self.tape[0].body if self.tape else None
        if not isinstance(body, BatchBody) or (not hashes and body.hashes):
            return None
        step = self.read_step(self.tape.popleft())
        if list(step.hashes) != list(hashes):
            raise ResumeError(f"{self.folder}: batch {step.number} is not of the requests that come now")
        return step

    def commit(self, step: EditStep, number: int, originals: Mapping[int, Tensor]) -> None:
        """Write a batch, and the originals of layers that were not edited before; all of it or nothing.

        Raises:
            ResumeError: If batches of the interrupted run were not done again yet.
        """
        self._require_end_of_tape()
        entries, names = len(self.ledger.entries), [f"batch-{number:05d}.safetensors"]
        try:
            write_tensors(self.folder / names[0], _tensors(step))
            for layer, tensor in originals.items():
                names.append(f"original-{layer:05d}.safetensors")
                write_tensors(self.folder / names[-1], {str(layer): tensor})
            files = {name: digest(self.folder / name) for name in names}
            self.ledger.append(_body(step, number, files, texts=self.texts))
            sys.audit("cakeflow.files", "committed", names[0])
        except BaseException:
            self.ledger.withdraw(entries)
            for name in names:
                (self.folder / name).unlink(missing_ok=True)
            raise

    def rollback(self, batches: Sequence[int], hashes: Mapping[int, str]) -> None:
        """Write that batches were taken back; ``hashes`` are those of the weights that changed by it."""
        self._require_end_of_tape()
        places = {f"layer {layer}": hashed for layer, hashed in hashes.items()}
        self.ledger.append(RollbackBody(batches=list(batches), places=places, **circumstances()))

    def taken_back(self, entry: Entry) -> tuple[list[int], dict[int, str]]:
        """Numbers of the batches that a rollback took back, and the hashes of the weights that changed by it."""
        assert isinstance(entry.body, RollbackBody)
        with self._as_written(entry):
            return entry.body.batches, {_layer(place): hashed for place, hashed in entry.body.places.items()}

    @property
    def earlier(self) -> int:
        """How many batches of earlier runs the record begins with."""
        first = self.ledger.entries[0].body
        return first.earlier if isinstance(first, ModelBody) else 0

    def _require_end_of_tape(self) -> None:
        if self.tape:
            raise ResumeError(
                f"{self.folder} holds {sum(e.kind == 'batch' for e in self.tape)} batches that were not done again "
                "yet; let the interrupted run go on to its end first"
            )

    def read_step(self, entry: Entry) -> EditStep:
        """A batch as it was committed.

        Raises:
            LedgerError: If a file is not the one that was written, or the entry is none of a batch.
        """
        assert isinstance(entry.body, BatchBody)
        with self._as_written(entry):
            return _step(entry.body, self.read(entry, f"batch-{entry.body.batch:05d}.safetensors"))

    def originals(self, entry: Entry) -> dict[int, Tensor]:
        """The originals that were written together with a batch.

        Raises:
            LedgerError: As ``read``.
        """
        assert isinstance(entry.body, BatchBody)
        with self._as_written(entry):
            names = [name for name in entry.body.files if name.startswith("original-")]
            return {int(layer): tensor for name in names for layer, tensor in self.read(entry, name).items()}

    @contextmanager
    def _as_written(self, entry: Entry) -> Iterator[None]:
        """Whatever else an entry holds than what we write is an error of the ledger."""
        try:
            yield
        except EditError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            where = f"{self.folder / LEDGER}, entry {entry.number}"
            raise LedgerError(
                f"{where}: not what cakeflow writes of a {entry.kind} ({error!r}); {FROM_A_COPY}"
            ) from error

    def read(self, entry: Entry, name: str) -> dict[str, Tensor]:
        """A file of tensors that an entry tells of.

        Raises:
            LedgerError: If it is missing, is not the one that was written, or lies elsewhere.
        """
        path, where = self.folder / name, f"{self.folder / LEDGER}, entry {entry.number}"
        if Path(name).name != name:
            raise LedgerError(f"{where}: {name!r} is not a file name; a record may not name files outside its folder")
        if not path.is_file():
            raise LedgerError(f"{where}: {name} is missing; {FROM_A_COPY}")
        assert isinstance(entry.body, (BatchBody, EndBody))
        if digest(path) != entry.body.files[name]:
            raise LedgerError(f"{where}: {name} was changed after it was written; {FROM_A_COPY}")
        try:
            return load_file(path)
        except SafetensorError as error:
            raise LedgerError(f"{where}: {name} holds no tensors: {error}; {FROM_A_COPY}") from error


def run_folder(trainer: L.Trainer) -> Path | None:
    """Where a Trainer's logger keeps its files, if it does: the run folder."""
    return Path(trainer.log_dir) if trainer.log_dir and trainer.loggers else None


def _differences(told: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two bodies, in words; circumstances aside."""
    if isinstance(told, dict) and isinstance(now, Mapping):
        names = [part for part in {**told, **now} if part not in INCIDENTAL]
        return [line for n in names for line in _differences(told.get(n), now.get(n), f"{name}.{n}" if name else n)]
    told, now = (list(part) if isinstance(part, tuple) else part for part in (told, now))
    return [] if told == now else [f"{name} was {_short(told)}, is {_short(now)}"]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _layer(place: str) -> int:
    return int(place.removeprefix("layer "))


def _step(body: BatchBody, tensors: dict[str, Tensor]) -> EditStep:
    layers = {_layer(change.place): change for change in body.changes}
    updates = {layer: Update(tensors[f"{layer}/right"], tensors.get(f"{layer}/left")) for layer in layers}
    return EditStep(
        requests=tuple(parse_requests(body.requests)) if body.requests else (),
        layers=[
            LayerStep(layer, tensors[f"{layer}/keys"], updates[layer], change.numbers)
            for layer, change in layers.items()
        ],
        targets=[dict(target) for target in body.targets],
        values={int(name.split("/")[0]): value for name, value in tensors.items() if name.endswith("/target")},
        numbers=body.numbers,
        hashes=tuple(body.hashes),
        before={layer: change.before for layer, change in layers.items()},
        after={layer: change.after for layer, change in layers.items()},
        number=body.batch,
    )


def _tensors(step: EditStep) -> dict[str, Tensor]:
    tensors = {f"{layer}/target": values for layer, values in step.values.items()}
    for part in step.layers:
        tensors |= {f"{part.layer}/keys": part.keys, f"{part.layer}/right": part.update.right}
        if part.update.left is not None:
            tensors[f"{part.layer}/left"] = part.update.left
    return tensors


def _body(step: EditStep, number: int, files: dict[str, str], *, texts: bool) -> BatchBody:
    changes = [
        ChangeBody(
            place=f"layer {part.layer}",
            kind="WeightChange",
            numbers=part.numbers,
            before=step.before[part.layer],
            after=step.after[part.layer],
            prefix=str(part.layer),
        )
        for part in step.layers
    ]
    return BatchBody(
        batch=number,
        files=files,
        hashes=list(step.hashes),
        **({"requests": [request.to_dict() for request in step.requests]} if texts else {}),
        targets=[TargetBody.model_validate(target) for target in step.targets],
        numbers=step.numbers,
        changes=changes,
    )
