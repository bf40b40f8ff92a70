"""A run folder, read back and checked. Nothing in it is executed or unpickled."""

from __future__ import annotations

import base64
import csv
import io
import math
import re
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import cycle
from pathlib import Path

from pydantic import ConfigDict

from cakeflow.data.images import THUMBNAILS, in_words
from cakeflow.errors import RunFolderError
from cakeflow.evaluation.outcome import Outcome
from cakeflow.export.manifest import RollbackInfo, rollback_of, rollbacks_of, utc
from cakeflow.journal.force import replaced_by
from cakeflow.journal.ledger import Entry, bodies, read_entries, taken_back
from cakeflow.journal.schema import (
    BatchBody,
    EndBody,
    EvaluatedRequest,
    EvaluationBody,
    FreeAnswer,
    RequestTexts,
    RunBody,
    RunInfo,
    TargetBody,
)
from cakeflow.journal.store import ANSWERS, ledger_path
from cakeflow.storage.folders import require_inside
from cakeflow.storage.typed import LARGEST, Count, S, parse_as, parse_lines, read_as


class EditedRequest(RequestTexts):
    """A request in the ledger.

    Attributes:
        batch: Number of its batch, as ``cakeflow rollback --batch`` takes it.
        targets: One target per value site.
        rollback: Who took it or its batch back, and when; None if nobody did.
        replaced: Number of the later batch that took its place; None if none did.
    """

    model_config = ConfigDict(extra="ignore")

    batch: Count
    targets: list[TargetBody]
    rollback: RollbackInfo | None = None
    replaced: Count | None = None


@dataclass(frozen=True)
class RunFolder:
    """Content of a run folder.

    Attributes:
        path: The folder.
        info: Content of ``run.json``; older runs have no metrics, timings, peaks, protocol and edits in it.
        before: Answers of the unedited model, per request; None if they were not written.
        after: Answers of the edited model, per request; None if they were not written.
        answers: Free answers before and after the run; empty if the model was not asked freely.
        ledger: Entries of the ledger from the start of the run on; empty if there is none.
        edits: Every request that the run edited, in order, those taken back included.
        log: Rows of ``metrics.csv``, without empty cells.
        config: The YAML that the run was started with; empty if there is none.
        thumbnails: First digits of the hash of a picture -> the picture made small, a PNG file in base64.
        written: Time at which ``run.json`` was written.
    """

    path: Path
    info: RunInfo
    before: list[EvaluatedRequest] | None
    after: list[EvaluatedRequest] | None
    answers: list[FreeAnswer]
    ledger: list[Entry]
    edits: list[EditedRequest]
    log: list[dict[str, float]]
    config: str
    thumbnails: dict[str, str]
    written: datetime

    @classmethod
    def read(cls, path: str | Path) -> RunFolder:
        """Read and check a run folder.

        Raises:
            RunFolderError: If it is none, or if a file in it is broken; the file, the line and the remedy are named.
        """
        path = Path(path)
        info, texts = _info(path), [_text(path / name) for name in ("config.yaml", "hparams.yaml")]
        ledger = _ledger(ledger_path(path))
        return cls(
            path=path,
            info=info,
            before=_lines(EvaluatedRequest, path / "before.jsonl"),
            after=_lines(EvaluatedRequest, path / "after.jsonl"),
            answers=_lines(FreeAnswer, path / ANSWERS) or [],
            ledger=ledger,
            edits=_edits(ledger_path(path), ledger),
            log=_log(path / "metrics.csv"),
            config=next((text for text in texts if text.strip() not in ("", "{}")), ""),
            thumbnails=dict(_thumbnails(path)),
            written=_written(path / "run.json"),
        )

    def metrics(self, stage: str) -> dict[str, float]:
        """Return the metrics of a stage, ``before`` or ``after``, as the run logged them."""
        if stage in self.info.metrics:
            return self.info.metrics[stage]
        cells = (cell for row in self.log for cell in row.items())
        return {name.removeprefix(f"{stage}/"): value for name, value in cells if name.startswith(f"{stage}/")}

    @property
    def outcome(self) -> Outcome | None:
        """What became of the run; None if the model was not asked freely."""
        return Outcome(self.answers, side_effects=self.info.side_effects) if self.answers else None

    @property
    def start(self) -> RunBody | None:
        """Who started the run, and with what; None without a ledger."""
        return next(iter(bodies(self.ledger, RunBody)), None)

    @property
    def times(self) -> dict[str, str]:
        """When the run started and ended (UTC), as far as it is known."""
        if self.start is None:
            return {"Written": utc(self.written.isoformat())}
        ends = [utc(entry.time) for entry in self.ledger if isinstance(entry.body, EndBody)]
        return {"Started": utc(self.ledger[0].time), "Ended": ends[-1] if ends else "not ended"}

    @property
    def rollbacks(self) -> list[RollbackInfo]:
        """What was taken back, whole batches and single facts, oldest first."""
        return rollbacks_of(self.ledger)

    @property
    def outdated(self) -> bool:
        """True if batches or facts were taken back after the last measurement of the edited model."""
        rollbacks = [rollback_of(entry) for entry in self.ledger if rollback_of(entry) or _measures(entry)]
        return bool(rollbacks) and rollbacks[-1] is not None

    @property
    def size(self) -> int:
        """Number of edits in the run."""
        return len(self.edits) if self.info.edits is None else self.info.edits

    @property
    def timed(self) -> int:
        """Number of edits that the run's times are of."""
        return self.size if self.info.timed is None else self.info.timed


LARGEST_THUMBNAIL = 1 << 18
"""Most bytes of a picture that goes onto the page."""
REMEDY = "the file was changed or cut off: run the edit again, or delete the file to do without it"


def _info(folder: Path) -> RunInfo:
    path = folder / "run.json"
    if not path.is_file():
        inside = ", ".join(sorted(str(each.parent) for each in folder.glob("*/run.json"))[-5:])
        remedy = f"give one of {inside}" if inside else "give the folder that cakeflow fit printed as 'run folder'"
        raise RunFolderError(f"{folder} is no run folder: it has no run.json; {remedy}")
    return parse_as(RunInfo, _text(path), str(path), RunFolderError, REMEDY)


def _lines(kind: type[S], path: Path) -> list[S] | None:
    if not path.is_file():
        return None
    return parse_lines(kind, _text(path), path, RunFolderError, REMEDY)


def _thumbnails(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the digits in the name, and the content in base64, of every picture in a run folder."""
    for path in sorted(folder.glob(THUMBNAILS)):
        content = require_inside(path, folder).read_bytes()
        if not content.startswith(b"\x89PNG\r\n") or len(content) > LARGEST_THUMBNAIL:
            raise RunFolderError(f"{path}: no PNG file of at most {LARGEST_THUMBNAIL} bytes; {REMEDY}")
        yield path.stem.partition("-")[2], base64.b64encode(content).decode()


def _measures(entry: Entry) -> bool:
    return isinstance(entry.body, EvaluationBody) and entry.body.stage == "after"


def _ledger(path: Path) -> list[Entry]:
    """Return the entries of the run itself: an earlier run's batches come before its start, noted again by the desk."""
    entries = list(read_entries(path)) if path.is_file() else []
    return entries[min((entry.number for entry in entries if isinstance(entry.body, RunBody)), default=0) :]


def _edits(path: Path, ledger: Sequence[Entry]) -> list[EditedRequest]:
    """Return the requests of the run's batches, each once; none if their texts were not stored.

    Of one that was edited again the last entry in force counts.
    """
    edits: dict[str, EditedRequest] = {}
    for name, edit in _entries(path, ledger):
        if name not in edits or edit.rollback is None or edits[name].rollback is not None:
            edits[name] = edit
    return list(edits.values())


def _entries(path: Path, ledger: Sequence[Entry]) -> Iterator[tuple[str, EditedRequest]]:
    """Yield hash and entry of every request of the run's batches."""
    batches, facts = taken_back(ledger)
    own = [body for body in bodies(ledger, BatchBody) if body.batch not in batches]
    by = replaced_by([(body.batch, body.hashes, body.replaced) for body in own], facts)
    replaced = {body.batch: names for body, names in zip(own, by, strict=True)}
    for body in bodies(ledger, BatchBody):
        owners = body.owners or range(len(body.requests))  # all of them at one value site, then all at the next
        for place, request in enumerate(body.requests):
            targets = [target for target, owner in zip(body.targets, cycle(owners), strict=False) if owner == place]
            where = f"{path}, batch {body.batch}, requests.{place}"
            name = "".join(body.hashes[place : place + 1])
            entry = batches.get(body.batch) or facts.get((body.batch, name))
            outcome = {"rollback": entry and rollback_of(entry), "replaced": replaced.get(body.batch, {}).get(name)}
            content = {**in_words(request), "batch": body.batch, "targets": targets, **outcome}
            yield name or where, read_as(EditedRequest, content, where, RunFolderError, REMEDY)


def _log(path: Path) -> list[dict[str, float]]:
    rows = []
    for number, row in enumerate(_rows(path), 2):
        try:
            rows.append({name: _cell(cell) for name, cell in row.items() if cell})
        except (TypeError, ValueError) as error:
            raise RunFolderError(f"{path}, line {number}: {error}; {REMEDY}") from error
    return rows


def _rows(path: Path) -> Iterator[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    try:
        if beyond := [name for name in reader.fieldnames or () if re.match(r"layer\d{5}", name)]:
            raise RunFolderError(f"{path}, column {reprlib.repr(beyond[0])}: no model has such a layer; {REMEDY}")
        yield from reader
    except csv.Error as error:
        raise RunFolderError(f"{path}: {error}; {REMEDY}") from error


def _cell(text: str) -> float:
    """Return a logged number, nan for one that cannot have been measured: loggers write whatever they are given."""
    return value if abs(value := float(text)) <= LARGEST else math.nan


def _written(path: Path) -> datetime:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, timezone.utc)
    except (OSError, OverflowError, ValueError) as error:
        raise RunFolderError(f"{path}, time of writing: {error}; touch the file") from error


def _text(path: Path) -> str:
    if not require_inside(path, path.parent).is_file():
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RunFolderError(f"{path}: {error}; {REMEDY}") from error
