"""What a run left on disk, read back and checked. Nothing of it is executed or unpickled."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cakeflow.errors import RunFolderError
from cakeflow.journal.ledger import read_entries

NUMBER = (int, float)
MAYBE_TEXT = (str, type(None))
MAYBE_NUMBER = (int, float, type(None))


@dataclass(frozen=True, slots=True)
class PromptResult:
    """How one prompt was answered.

    Attributes:
        kind: ``rewrite``, ``paraphrase`` or ``neighborhood``.
        prompt: The text.
        expected: The continuation that is right after the edit.
        rival: The other one, if the record names one.
        expected_logprob: Mean log-probability per token of ``expected``, natural logarithm.
        rival_logprob: The same of ``rival``.
        correct: Whether every token of ``expected`` is the arg-max.
        tokens: Share of its tokens that are.
        answered: 1 where the model gives it when it answers freely, else 0; None where it was not asked to.
    """

    kind: str
    prompt: str
    expected: str
    rival: str | None
    expected_logprob: float | None
    rival_logprob: float | None
    correct: bool
    tokens: float | None = None
    answered: float | None = None

    @property
    def success(self) -> bool | None:
        """Whether ``expected`` is more likely than ``rival``; None without a rival, False if it is not a number."""
        if self.rival_logprob is None:
            return None
        return self.expected_logprob is not None and self.expected_logprob > self.rival_logprob


@dataclass(frozen=True, slots=True)
class EvaluatedRequest:
    """How one record was answered: its prompts, and the texts that were generated (prompt, text)."""

    index: int
    prompt: str
    subject: str
    target_new: str
    target_true: str | None
    relation: str | None
    case_id: int | str | None
    prompts: tuple[PromptResult, ...]
    generations: tuple[tuple[str, str], ...]

    @property
    def key(self) -> tuple[str, str, str]:
        """What it has in common with its edit in the journal."""
        return self.prompt, self.subject, self.target_new

    def of_kind(self, kind: str) -> list[PromptResult]:
        """Its prompts of a kind."""
        return [prompt for prompt in self.prompts if prompt.kind == kind]


@dataclass(frozen=True, slots=True)
class Target:
    """The target value found for one edit at one layer: its loss, the new target's probability, Adam's steps."""

    layer: int
    loss: float
    probability: float
    steps: float


@dataclass(frozen=True, slots=True)
class EditedRequest:
    """One request as the ledger has it: the number of its batch, from 1, and a target per value_site layer."""

    batch: int
    prompt: str
    subject: str
    target_new: str
    target_true: str | None
    relation: str | None
    targets: tuple[Target, ...]

    @property
    def key(self) -> tuple[str, str, str]:
        """What it has in common with its record."""
        return self.prompt, self.subject, self.target_new


@dataclass(frozen=True)
class RunFolder:
    """A run folder's content.

    Attributes:
        path: The folder.
        info: ``run.json``: model, settings, versions and, of newer runs, metrics, timings, peaks, protocol, edits.
        before: Records as the unedited model answered them; None if they were not written.
        after: The same of the edited model.
        edits: Every request that the run edited, in order.
        log: Rows of ``metrics.csv``, empty cells left out.
        config: The YAML that the run was started with; empty if there is none.
        written: When ``run.json`` was written.
    """

    path: Path
    info: Mapping[str, Any]
    before: list[EvaluatedRequest] | None
    after: list[EvaluatedRequest] | None
    edits: list[EditedRequest]
    log: list[dict[str, float]]
    config: str
    written: datetime

    @classmethod
    def read(cls, path: str | Path) -> RunFolder:
        """Read and check a run folder.

        Raises:
            RunFolderError: If it is none, or if a file in it is broken; the file, the line and the remedy are named.
        """
        path = Path(path)
        info, place = _read_info(path), path / "run.json"
        texts = [_text(path / name) for name in ("config.yaml", "hparams.yaml")]
        return cls(
            path=path,
            info=info,
            before=_read_records(path / "before.jsonl"),
            after=_read_records(path / "after.jsonl"),
            edits=_read_journal(path / "journal" / "ledger.jsonl"),
            log=_read_log(path / "metrics.csv"),
            config=next((text for text in texts if text.strip() not in ("", "{}")), ""),
            written=datetime.fromtimestamp(place.stat().st_mtime, timezone.utc),
        )

    def metrics(self, stage: str) -> dict[str, float]:
        """The metrics of a stage, ``before`` or ``after``, as the run logged them."""
        if stage in self.info.get("metrics", {}):
            return {name: math.nan if value is None else value for name, value in self.info["metrics"][stage].items()}
        rows = (
            {k.removeprefix(f"{stage}/"): v for k, v in row.items() if k.startswith(f"{stage}/")} for row in self.log
        )
        return {name: value for row in rows for name, value in row.items()}

    @property
    def size(self) -> int:
        """Edits of the run."""
        return int(self.info.get("edits", len(self.edits)))


def _read_info(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    if not path.is_file():
        inside = ", ".join(sorted(str(found.parent) for found in folder.glob("*/run.json"))[-5:])
        remedy = f"give one of {inside}" if inside else "give the folder that cakeflow fit printed as 'run folder'"
        raise RunFolderError(f"{folder} is no run folder: it has no run.json; {remedy}")
    info = _json(_text(path), str(path))
    expected: dict[str, type] = {"model": dict, "settings": dict, "versions": dict}
    optional: dict[str, type] = {"metrics": dict, "timings": dict, "peaks": dict, "edits": int, "protocol": str}
    for name, kind in expected.items():
        _get(info, name, (kind,), f"{path} (this cakeflow reads runs that have {', '.join(expected)})")
    for name, kind in optional.items():
        if name in info:
            _get(info, name, (kind,), str(path))
    for name in ("timings", "peaks"):
        _numbers(info.get(name, {}), f"{path}, {name}")
    for stage in info.get("metrics", {}):
        _numbers(_get(info["metrics"], stage, (dict,), f"{path}, metrics"), f"{path}, metrics.{stage}")
    return info


def _read_records(path: Path) -> list[EvaluatedRequest] | None:
    return [_record(entry, where) for where, entry in _lines(path)] if path.is_file() else None


def _read_journal(path: Path) -> list[EditedRequest]:
    """The requests of the run's own batches, those taken back left out; none where their texts were not kept."""
    entries = list(read_entries(path)) if path.is_file() else []
    own = max((entry.number for entry in entries if entry.kind == "run"), default=0)
    gone = {number for entry in entries if entry.kind == "rollback" for number in entry.body.get("batches", ())}
    edits: list[EditedRequest] = []
    batches = (entry for entry in entries[own:] if entry.kind == "batch" and entry.body.get("batch") not in gone)
    for number, entry in enumerate(batches, 1):
        edits += _step({"requests": [], **entry.body}, number, f"{path}, entry {entry.number}")
    return edits


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every line of a JSONL file, with its place; nothing if there is no such file."""
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _json(line, where)


def _record(entry: Mapping[str, Any], where: str) -> EvaluatedRequest:
    prompts = tuple(_prompt(part, f"{where}, prompts") for part in _get(entry, "prompts", (list,), where))
    texts = _get(entry, "generations", (list, type(None)), where) or ()
    inside = f"{where}, generations"
    generations = tuple((_get(part, "prompt", (str,), inside), _get(part, "text", (str,), inside)) for part in texts)
    case = _get(entry, "case_id", (int, str, type(None)), where)
    index = _get(entry, "index", (int,), where)
    return EvaluatedRequest(index, **_fact(entry, where), case_id=case, prompts=prompts, generations=generations)


def _prompt(entry: Mapping[str, Any], where: str) -> PromptResult:
    kinds: dict[str, tuple[type, ...]] = {
        "kind": (str,),
        "prompt": (str,),
        "expected": (str,),
        "rival": MAYBE_TEXT,
        "expected_logprob": MAYBE_NUMBER,
        "rival_logprob": MAYBE_NUMBER,
        "correct": (bool,),
        "tokens": MAYBE_NUMBER,
        "answered": MAYBE_NUMBER,
    }
    return PromptResult(**{name: _get(entry, name, kind, where) for name, kind in kinds.items()})


def _step(entry: Mapping[str, Any], batch: int, where: str) -> Iterator[EditedRequest]:
    """The requests of a step; its targets are all requests' at one value_site layer, then all at the next."""
    requests, targets = _get(entry, "requests", (list,), where), _get(entry, "targets", (list,), where)
    for number, request in enumerate(requests):
        found = tuple(_target(part, f"{where}, targets") for part in targets[number :: len(requests)])
        yield EditedRequest(batch, **_fact(request, f"{where}, requests"), targets=found)


def _fact(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    texts = {name: _get(entry, name, (str,), where) for name in ("prompt", "subject", "target_new")}
    return texts | {name: _get(entry, name, MAYBE_TEXT, where) for name in ("target_true", "relation")}


def _target(entry: Mapping[str, Any], where: str) -> Target:
    return Target(*(_get(entry, name, NUMBER, where) for name in ("layer", "loss", "probability", "steps")))


def _read_log(path: Path) -> list[dict[str, float]]:
    rows = []
    for number, row in enumerate(csv.DictReader(_text(path).splitlines()), 2):
        try:
            rows.append({name: float(cell) for name, cell in row.items() if cell})
        except (TypeError, ValueError) as error:
            raise RunFolderError(f"{path}, line {number}: {error}; {REMEDY}") from error
    return rows


REMEDY = "the file was changed or cut off: run the edit again, or delete the file to do without it"


def _text(path: Path) -> str:
    if not path.is_file():
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RunFolderError(f"{path}: {error}; {REMEDY}") from error


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise RunFolderError(f"{where}: {error}; {REMEDY}") from error
    if not isinstance(found, dict):
        raise RunFolderError(f"{where}: expected an object, found {type(found).__name__}; {REMEDY}")
    return found


def _get(entry: object, name: str, kinds: tuple[type, ...], where: str) -> Any:
    """A field of the right kind; a field that may be empty may also be missing."""
    value = entry.get(name) if isinstance(entry, Mapping) else entry
    if not isinstance(entry, Mapping) or not isinstance(value, kinds):
        expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise RunFolderError(f"{where}, {name} = {str(value)[:60]!r}: expected {expected}; {REMEDY}")
    return value


def _numbers(entry: Mapping[str, Any], where: str) -> None:
    for name in entry:
        _get(entry, name, MAYBE_NUMBER, where)
