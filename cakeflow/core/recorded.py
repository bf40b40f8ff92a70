"""A finished run as its ledger has it, read to be searched and solved anew: method, requests in order, outcome."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cakeflow.data.images import ImageEditRequest
from cakeflow.data.request import EditRequest
from cakeflow.data.schemas import parse_requests
from cakeflow.data.sources import Source, read_entries
from cakeflow.errors import ConfigError, LedgerError, ResumeError, RunFolderError, listed
from cakeflow.journal import ledger
from cakeflow.journal.audit import ledger_of
from cakeflow.journal.changes import kind_of
from cakeflow.journal.ledger import Entry, bodies, taken_back
from cakeflow.journal.schema import FORMAT, BatchBody, EndBody, EvaluationBody, ModelBody, PolicyBody, RunBody
from cakeflow.journal.steps import request_hash
from cakeflow.journal.store import FROM_A_COPY, LEDGER
from cakeflow.storage.hashing import file_hash

FOR_TEXTS = "name the data that the run was started with: --data SOURCE"


@dataclass(frozen=True)
class RecordedRun:
    """A finished run on record.

    Attributes:
        path: Its ledger.
        entries: All entries of the ledger.
        base: The unedited model.
        start: What the run was started with.
        own: The entries of the batches that the run itself edited, in order.
        requests: The requests, in the order in which they were given.
    """

    path: Path
    entries: list[Entry]
    base: ModelBody
    start: RunBody
    own: list[Entry]
    requests: list[EditRequest]

    @classmethod
    def read(cls, run: Path, data: Source | None = None) -> RecordedRun:
        """Read a run, and check everything that its repetition needs beside model and method.

        Args:
            run: A run folder, or its ledger alone (``journal/ledger.jsonl``), which says everything but by how much
                weights differ.
            data: Where the requests are, if the ledger has their hashes only, or if they are pictures.

        Raises:
            RunFolderError: If there is no ledger, or its batches are not those of the requests that it names.
            LedgerError: If the ledger was changed after it was written, or a plugin's kind of change is missing.
            ResumeError: If the run has not ended, was written in format 1, or goes on from a run that is not here.
            ConfigError: If texts or pictures are not on record and not in ``data`` either.
        """
        path = _ledger(run)
        entries = list(ledger.read_entries(path))
        base, start, own = _parts(path, entries)
        record = cls(path, entries, base, start, own, _requests(path, start, bodies(own, BatchBody), data))
        if base.earlier and not record.has_tensors:
            raise ResumeError(
                f"{path} goes on from {base.earlier} batches of an earlier run, whose tensors are not beside it; give "
                "the whole run folder"
            )
        record._check_batches()
        return record

    @property
    def batches(self) -> list[BatchBody]:
        """What the ledger says of the run's own batches."""
        return bodies(self.own, BatchBody)

    @property
    def has_tensors(self) -> bool:
        """True if the ledger lies where it was written, with the files of all batches: then sizes can be told."""
        files = [name for body in bodies(self.entries, BatchBody) for name in body.files]
        return self.path.name == LEDGER and all((self.path.parent / Path(name).name).is_file() for name in files)

    @property
    def evaluations(self) -> dict[str, EvaluationBody]:
        """Stage -> the run's last measurement there, up to its end."""
        return {body.stage: body for body in bodies(_run_of(self.entries), EvaluationBody)}

    def _check_batches(self) -> None:
        """Check that the kinds of all changes are known here and, if the tensors are there, that they are unchanged."""
        for body in bodies(self.entries, BatchBody):
            for change in body.changes:
                kind_of(change.kind)
            for name, expected in body.files.items() if self.has_tensors else ():
                if file_hash(self.path.parent / Path(name).name) != expected:
                    raise LedgerError(
                        f"{self.path}: {name} was changed after it was written; {FROM_A_COPY}, or give a copy of the "
                        "ledger alone: then no size of a weight's difference is known"
                    )

    @property
    def notes(self) -> list[str]:
        """What a repetition leaves out, in sentences."""
        return list(self._notes())

    def _notes(self) -> Iterator[str]:
        batches, facts = taken_back(self.entries)
        if self.base.earlier:
            yield f"{self.base.earlier} batches of an earlier run are applied as recorded and not searched again"
        if gone := sorted({body.batch for body in self.batches} & set(batches)):
            yield f"batches taken back after the run ({listed(gone)}) are repeated all the same; the rollback is not"
        if facts:
            yield f"{len(facts)} facts undone after the run are edited all the same; the undoing is not repeated"
        if bodies(self.entries, PolicyBody) or any("policy" in body.inputs for body in self.batches):
            yield "the policy of the run is not asked"
        if not self.has_tensors:
            yield "the tensors of the run are not beside its ledger: by how much weights differ cannot be told"


def _ledger(run: Path) -> Path:
    if run.is_dir():
        return ledger_of(run)
    if run.suffix != ".jsonl" or not run.is_file():
        raise RunFolderError(
            f"{run} is neither a run folder nor its ledger; give the folder, or journal/{LEDGER} in it"
        )
    return run


def _run_of(entries: Sequence[Entry]) -> list[Entry]:
    """The entries from the start of a run to its end; those of earlier runs and what was done later are left out."""
    first = max((each.number for each in entries if isinstance(each.body, RunBody)), default=0)
    last = next((each.number for each in entries[first:] if isinstance(each.body, EndBody)), len(entries))
    return list(entries[first:last])


def _parts(path: Path, entries: Sequence[Entry]) -> tuple[ModelBody, RunBody, list[Entry]]:
    """Unedited model, start and own batches of a run that has ended."""
    models, runs = bodies(entries, ModelBody), bodies(entries, RunBody)
    if not models or not runs:
        raise RunFolderError(f"{path} names no run that was started; give the ledger of one")
    start = runs[-1]
    if start.format != FORMAT:
        raise ResumeError(
            f"{path} has format {start.format}, whose method is not on record; apply it as it is: cakeflow replay RUN"
        )
    own = [each for each in _run_of(entries) if isinstance(each.body, BatchBody) and each.body.undoes is None]
    if not bodies(entries, EndBody):
        done = len({name for body in bodies(own, BatchBody) for name in body.hashes})
        raise ResumeError(
            f"{path}: the run stopped after {done} of {start.edits} facts, and what the others are is not on record; "
            "let the command that started it go on, with --run_dir, and reproduce it when it has ended"
        )
    return models[0], start, own


def _order(path: Path, start: RunBody, batches: Sequence[BatchBody]) -> list[str]:
    """Hashes of the requests as they were given; a batch of nothing but earlier facts edited them again (repairs)."""
    for repairs in (False, True):
        hashes: list[str] = []
        for body in batches:
            hashes += [] if repairs and set(body.hashes) <= set(hashes) else body.hashes
        if hashlib.sha256("".join(hashes).encode()).hexdigest() == start.data:
            return hashes
    raise RunFolderError(
        f"{path}: its batches have other facts than the {start.edits} that the run was started with ({start.data[:12]}"
        "); take the ledger from a copy"
    )


def _requests(path: Path, start: RunBody, batches: Sequence[BatchBody], data: Source | None) -> list[EditRequest]:
    hashes = _order(path, start, batches)
    if data is not None:
        known = {request_hash(each): each for each in parse_requests(read_entries(data))}
        if missing := [name[:12] for name in dict.fromkeys(hashes) if name not in known]:
            names = listed(missing, 3)
            raise ConfigError(f"{len(missing)} facts of the run are not in the data, by hash: {names}; {FOR_TEXTS}")
        return [known[name] for name in hashes]
    texts = {name: text for body in batches for name, text in zip(body.hashes, body.requests, strict=False)}
    if missing := [name[:12] for name in dict.fromkeys(hashes) if name not in texts]:
        raise ConfigError(
            f"{path} has hashes of {len(missing)} facts and not their texts (record_texts: false): "
            f"{listed(missing, 3)}; {FOR_TEXTS}"
        )
    requests = parse_requests([texts[name] for name in hashes])
    if pictures := [each.text for each in requests if isinstance(each, ImageEditRequest)]:
        raise ConfigError(f"{path} has hashes of pictures and no pixels ({listed(pictures, 3)}); {FOR_TEXTS}")
    if other := [name[:12] for name, each in zip(hashes, requests, strict=True) if request_hash(each) != name]:
        raise LedgerError(f"{path}: the texts of {listed(other, 3)} do not have these hashes; {FOR_TEXTS}")
    return requests
