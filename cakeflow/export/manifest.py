"""The manifest of an export: which model it is of, what was changed in it, and the hashes of all that."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from cakeflow.errors import ExportError
from cakeflow.journal.journal import Journal
from cakeflow.models.architecture import Site
from cakeflow.models.language import LanguageModel
from cakeflow.storage.atomic import check_free
from cakeflow.storage.hashing import tensor_hash

MANIFEST = "manifest.json"
VERSION = 1
DTYPES = ("torch.float16", "torch.bfloat16", "torch.float32", "torch.float64")
"""Of weights that can be edited."""


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` of an export says; the file also has the SHA-256 of all of it, and no other form.

    Attributes:
        format: ``model``, ``delta`` or ``lora``.
        model: Name of the base model, as it was given.
        fingerprint: Hash of the base model (``LanguageModel.fingerprint``).
        dtype: Type of its weights.
        edits: How many facts were edited.
        ledger: Hash of the last entry of the run's ledger; empty if none was kept.
        weights: Name of each weight that differs from the base -> its SHA-256 ``before`` and ``after``.
        files: Name of each file of tensors -> its SHA-256.
        version: Of this form.
    """

    format: str
    model: str
    fingerprint: str
    dtype: str
    edits: int
    ledger: str
    weights: dict[str, dict[str, str]]
    files: dict[str, str] = field(default_factory=dict)
    version: int = VERSION

    @classmethod
    def of(cls, journal: Journal, format: str) -> Manifest:
        """What there is to say of a journal's model as it is now; its files aside."""
        weights = {}
        for layer, original in sorted(journal.originals.items()):
            before, after = tensor_hash(original), tensor_hash(journal.lm.weight(layer))
            if before != after:
                weights[weight_name(journal.lm, layer)] = {"before": before, "after": after}
        return cls(
            format,
            _base_name(journal),
            journal.base["fingerprint"],
            journal.base["dtype"],
            journal.edits,
            journal.record.ledger.head if journal.record else "",
            weights,
        )

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest in a folder.

        Raises:
            ExportError: If there is none, or if it is not, byte for byte, what cakeflow writes.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise ExportError(f"{folder} has no {MANIFEST}; give a folder that cakeflow exported")
        data = path.read_bytes()
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ExportError(f"{path}: {error}; {REMEDY}") from error
        _check(found, str(path))
        manifest = cls(**{each.name: found[each.name] for each in fields(cls)})
        if manifest.text.encode() != data:
            raise ExportError(f"{path}: its content does not have its hash; {REMEDY}")
        return manifest

    @property
    def text(self) -> str:
        """The file: JSON in one form only, with the hash of the rest of it."""
        values = asdict(self)
        return _render({**values, "hash": hashlib.sha256(_render(values).encode()).hexdigest()})


def weight_name(lm: LanguageModel, layer: int) -> str:
    """Name of the parameter that an edit of a layer changes."""
    return f"{lm.architecture.path(Site(layer, 'mlp_out'))}.weight"


def require_place(folder: str | Path, *, overwrite: bool = False) -> Path:
    """Where an export may be written; only another export may be overwritten, since all of the folder is replaced.

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


REMEDY = "the export was changed after it was written; take it from a copy"


def _base_name(journal: Journal) -> str:
    entries = journal.record.ledger.entries if journal.record else ()
    names = [entry.body.get("model") for entry in entries if entry.kind == "run"]
    return str(names[-1] if names else journal.lm.model.name_or_path)


def _render(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1, sort_keys=True) + "\n"


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_weights(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(part, dict) and set(part) == {"before", "after"} and all(map(_is_hash, part.values()))
        for part in value.values()
    )


def _is_files(value: object) -> bool:
    return isinstance(value, dict) and all(
        re.fullmatch(r"\w[\w.-]*", name) is not None and _is_hash(part) for name, part in value.items()
    )


FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "version": (f"{VERSION}, the form that this cakeflow reads", lambda value: type(value) is int and value == VERSION),
    "format": ("model, delta or lora", lambda value: value in ("model", "delta", "lora")),
    "model": ("a name", lambda value: isinstance(value, str)),
    "fingerprint": ("a SHA-256", _is_hash),
    "dtype": (", ".join(DTYPES), lambda value: value in DTYPES),
    "edits": ("a count", lambda value: type(value) is int and value >= 0),
    "ledger": ("a SHA-256 or nothing", lambda value: value == "" or _is_hash(value)),
    "weights": ("hashes before and after, by name", _is_weights),
    "files": ("hashes by name of a file beside it", _is_files),
    "hash": ("a SHA-256", _is_hash),
}
"""Of the file: name -> what is expected, and whether a value is that."""


def _check(found: object, where: str) -> None:
    if not isinstance(found, dict) or set(found) != set(FIELDS):
        raise ExportError(f"{where}: expected an object with the fields {', '.join(FIELDS)}; {REMEDY}")
    for name, (wanted, fits) in FIELDS.items():
        if not fits(found[name]):
            raise ExportError(f"{where}, {name} = {ascii(found[name])[:60]}: expected {wanted}; {REMEDY}")
