"""The manifest of an export: its base model, the weights that differ from it, and the hashes of both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from cakeflow.errors import ExportError, counted
from cakeflow.journal.changes import ModuleChange
from cakeflow.journal.journal import Journal
from cakeflow.journal.ledger import Entry, bodies
from cakeflow.journal.schema import BatchBody, RollbackBody, RunBody
from cakeflow.storage.folders import check_free
from cakeflow.storage.hashing import tensor_hash
from cakeflow.storage.typed import SHA256, Count, Json, Schema, parse_as

MANIFEST = "manifest.json"
Format = Literal["model", "delta", "lora", "memory", "gguf"]
TOLERANCES = {"torch.float64": 1e-5, "torch.float32": 1e-5, "torch.float16": 0.01, "torch.bfloat16": 0.05}
"""Type of a model -> tolerance of adapters, whose float32 numbers are not rounded to that type as the weights are."""
FileName = Annotated[str, Field(pattern=r"^\w[\w.-]*(/\w[\w.-]*)?$")]
"""Name of a file in the same folder, or in one inside it."""


class WeightHashes(Schema):
    """SHA-256 of a weight in the base model and in the edited one."""

    before: SHA256
    after: SHA256


class ChangeInfo(Schema):
    """A module that was put in place: where, and the kind of the change."""

    place: str
    kind: str


class RollbackInfo(Schema):
    """Batches that were taken back, or single facts of one: by whom, and when (UTC, ISO 8601).

    Attributes:
        batches: Numbers of the batches.
        who: Who did it.
        time: When.
        facts: Number of facts of the batch that were taken back alone; 0 where whole batches were.
    """

    batches: list[Count]
    who: str
    time: str
    facts: Count = 0

    @property
    def words(self) -> str:
        """Who took them back, and when, as the end of a sentence about them."""
        return f"taken back by {self.who} on {utc(self.time)}"

    def __str__(self) -> str:
        part = f"{counted(self.facts, 'fact')} of " if self.facts else ""
        return f"{part}{batch_names(self.batches)} {self.words}"


def rollbacks_of(entries: Iterable[Entry]) -> list[RollbackInfo]:
    """Return what was taken back in a ledger, whole batches and single facts, oldest first."""
    return [each for each in map(rollback_of, entries) if each is not None]


def rollback_of(entry: Entry) -> RollbackInfo | None:
    """Return what an entry says of batches, or of single facts, that were taken back; None if it takes nothing back."""
    match entry.body:
        case RollbackBody() as body:
            return RollbackInfo(batches=body.batches, who=body.who, time=entry.time)
        case BatchBody(undoes=int(number)) as batch:
            return RollbackInfo(batches=[number], who=batch.who, time=entry.time, facts=len(batch.undone))
    return None


def batch_names(numbers: Iterable[int]) -> str:
    """Return the batches of these numbers in words, neighbors as a range.

    Example:
        >>> batch_names([2]), batch_names([4, 5, 6, 0])
        ('batch 2', 'batches 0, 4 to 6')
    """
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    parts = [str(each[0]) if len(each) == 1 else f"{each[0]} to {each[-1]}" for each in ranges]
    return f"batch{'es' * (sum(map(len, ranges)) > 1)} {', '.join(parts)}"


def utc(time: str) -> str:
    """Return a time of a ledger as people write it.

    Example:
        >>> utc("2026-03-01T12:30:59.250+00:00")
        '2026-03-01 12:30 UTC'
    """
    return f"{time[:16].replace('T', ' ')} UTC"


class Manifest(Schema):
    """Content of ``manifest.json`` in an export; the file has one form only, and its own hash.

    Attributes:
        format: ``model``, ``delta``, ``lora``, ``memory`` or ``gguf``.
        model: Name of the base model, as the user wrote it.
        fingerprint: Hash of the base model (``LanguageModel.fingerprint``).
        dtype: Type of its weights.
        edits: Number of edited facts.
        ledger: Hash of the last entry of the run's ledger; empty if there is no ledger.
        weights: Name of each weight that differs from the base -> its hashes.
        files: Name of each file of tensors -> its SHA-256.
        changes: The modules that were put in place, in order (``memory``); their tensors are named by their numbers.
        rollbacks: Batches and facts of the run that were taken back, and so are not in the model.
        tolerance: Largest difference of logits from the edited model's, relative to the largest of them (``lora``,
            ``gguf``); 0 where they are the same, bit for bit.
        details: What the format has to state, such as types and ranks with their errors; left out where there is none.
        version: Version of this form.
        hash: SHA-256 of all the rest, in the file; ``text`` computes it.
    """

    format: Format
    model: str
    fingerprint: SHA256
    dtype: Literal["torch.float16", "torch.bfloat16", "torch.float32", "torch.float64"]
    edits: Annotated[int, Field(ge=0)]
    ledger: SHA256 | Literal[""]
    weights: dict[str, WeightHashes]
    files: dict[FileName, SHA256] = Field(default_factory=dict)
    changes: list[ChangeInfo] = Field(default_factory=list)
    rollbacks: list[RollbackInfo] = Field(default_factory=list)
    tolerance: Annotated[float, Field(ge=0)] = 0.0
    details: dict[str, Json] = Field(default_factory=dict)
    version: Literal[2] = 2
    hash: SHA256 | Literal[""] = ""

    @classmethod
    def of(cls, journal: Journal, format: Format) -> Manifest:
        """Return the manifest of a journal's model as it is now, without files."""
        weights = {}
        for name, tensor in sorted(journal.state().items()):
            original = journal.original(name).get(name)
            if original is not None and (before := tensor_hash(original)) != (after := tensor_hash(tensor)):
                weights[name] = WeightHashes(before=before, after=after)
        entries = journal.store.ledger.entries if journal.store else []
        modules = [change for change in journal.changes if isinstance(change, ModuleChange)]
        return cls(
            format=format,
            model=[journal.policies.name, *(run.model for run in bodies(entries, RunBody))][-1],
            fingerprint=journal.base.fingerprint,
            dtype=journal.base.dtype,  # type: ignore[arg-type]  # checked when the manifest is made
            edits=journal.edits,
            ledger=journal.store.ledger.head if journal.store else "",
            weights=weights,
            tolerance=TOLERANCES[journal.base.dtype] if format == "lora" else 0.0,
            changes=[ChangeInfo(place=change.place, kind=type(change).__name__) for change in modules],
            rollbacks=rollbacks_of(entries),
        )

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest in a folder.

        Raises:
            ExportError: If there is none, or if it is not, byte for byte, what cakeflow writes.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise ExportError(f"{folder} has no {MANIFEST}; give a folder that cakeflow exported")
        data = path.read_bytes()
        manifest = parse_as(cls, data, str(path), ExportError, REMEDY)
        if manifest.text.encode() != data:
            raise ExportError(f"{path}: its content does not have its hash; {REMEDY}")
        return manifest

    @property
    def text(self) -> str:
        """Text of the file: JSON in one form only, with the hash of the rest of it."""
        whole = {place: {"facts"} for place, each in enumerate(self.rollbacks) if not each.facts}
        left_out: Any = {"hash": True, "rollbacks": whole} | ({} if self.details else {"details": True})
        values = self.model_dump(mode="json", exclude=left_out)
        return _render(values | {"hash": hashlib.sha256(_render(values).encode()).hexdigest()})


def require_place(folder: str | Path, *, overwrite: bool = False) -> Path:
    """Return where an export may be written; only an export may be overwritten, since all of the folder is replaced.

    Raises:
        ConfigError: If there is something and it is not to be overwritten.
        ExportError: If it is no export.
    """
    place = Path(folder).resolve()
    check_free(place, overwrite=overwrite)
    if place.is_dir() and any(place.iterdir()) and not (place / MANIFEST).is_file():
        raise ExportError(
            f"{place} is no export of cakeflow (it has no {MANIFEST}) and would be replaced with all that is in it; "
            "choose another folder"
        )
    return place


FROM_A_COPY = "take it from a copy"
REMEDY = f"the export was changed after it was written; {FROM_A_COPY}"


def _render(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1, sort_keys=True) + "\n"
