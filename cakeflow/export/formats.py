"""Writing an export: its files, its manifest, and all of it in the place of what was there, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cakeflow.errors import ConfigError, ExportError
from cakeflow.export.card import model_card
from cakeflow.export.delta import DELTA
from cakeflow.export.lora import write_lora
from cakeflow.export.manifest import MANIFEST, Format, Manifest, require_place, weight_name
from cakeflow.journal.journal import Journal
from cakeflow.journal.schema import BatchBody
from cakeflow.models.language import LanguageModel
from cakeflow.storage.atomic import write_folder, write_tensors
from cakeflow.storage.hashing import digest

CARD = "README.md"


def export(journal: Journal, folder: str | Path, format: Format = "model", *, overwrite: bool = False) -> Path:
    """Write the model as the journal has it now: after a rollback, without what was taken back.

    Args:
        journal: Of the edited model.
        folder: Where; its ``manifest.json`` says what it was made from.
        format: ``model`` is everything, in the Hugging Face format, with a model card; loaded, it gives the same
            logits, bit for bit. ``delta`` is the edited weights as they are, for ``apply_delta``. ``lora`` is an
            adapter in float32 that PEFT loads onto the base model. The edited weights took the same change in, rounded
            to their type: logits differ by less than 1e-5 of the largest one in float32, by less than 0.05 of it in
            bfloat16 (measured: 2e-6 and 0.02).
        overwrite: Whether an export that is there is replaced, as a whole, when the new one is complete.

    Returns:
        The folder.

    Raises:
        ConfigError: If something is there already, or there is no such format.
        ExportError: If no weight differs from the base (``delta``, ``lora``), or a change has full rank (``lora``).
    """
    if format not in FORMATS:
        raise ConfigError(f"format = {format!r}: expected {', '.join(FORMATS)}")
    place = require_place(folder, overwrite=overwrite)
    manifest = Manifest.of(journal, format)
    if format != "model" and not manifest.weights:
        raise ExportError(f"there is no {format} to write: no weight differs from the base; edit first")
    return _put(place, manifest, FORMATS[format](journal, manifest), overwrite=overwrite)


def export_applied(lm: LanguageModel, applied: Manifest, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write a whole model that a delta was applied to, with what the delta's manifest says of it.

    Args:
        lm: The model.
        applied: What ``apply_delta`` gave.
        folder: Where.
        overwrite: As in ``export``.

    Returns:
        The folder.

    Raises:
        ConfigError: If something is there already.
    """
    manifest = applied.model_copy(update={"format": "model", "files": {}})
    fill = _model_writer(lm, model_card(manifest, ()))
    return _put(require_place(folder, overwrite=overwrite), manifest, fill, overwrite=overwrite)


def _put(place: Path, manifest: Manifest, fill: Callable[[Path], None], *, overwrite: bool) -> Path:
    def write(fresh: Path) -> None:
        fill(fresh)
        files = {path.name: digest(path) for path in sorted(fresh.glob("*.safetensors"))}
        (fresh / MANIFEST).write_text(manifest.model_copy(update={"files": files}).text, encoding="utf-8")

    write_folder(place, write, overwrite=overwrite)
    return place


def _write_model(journal: Journal, manifest: Manifest) -> Callable[[Path], None]:
    entries = journal.record.ledger.entries if journal.record else ()
    numbers = {step.number for step in journal}
    present = [entry for entry in entries if not isinstance(entry.body, BatchBody) or entry.body.batch in numbers]
    return _model_writer(journal.lm, model_card(manifest, present))


def _model_writer(lm: LanguageModel, card: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        config = lm.model.config
        kept = config.dtype, config.architectures
        try:
            lm.model.save_pretrained(folder)
        finally:
            config.dtype, config.architectures = kept  # it notes both in the config, which is part of the model's hash
        lm.tokenizer.save_pretrained(folder)
        (folder / CARD).write_text(card, encoding="utf-8")

    return write


def _write_delta(journal: Journal, manifest: Manifest) -> Callable[[Path], None]:
    lm = journal.lm
    tensors = {weight_name(lm, layer): lm.weight(layer) for layer in journal.originals}
    edited = {name: tensors[name] for name in manifest.weights}
    return lambda folder: write_tensors(folder / DELTA, edited)


FORMATS: dict[str, Callable[[Journal, Manifest], Callable[[Path], None]]] = {
    "model": _write_model,
    "delta": _write_delta,
    "lora": write_lora,
}
"""Name -> what takes a journal and its manifest, refuses what cannot be, and gives what fills a folder."""
