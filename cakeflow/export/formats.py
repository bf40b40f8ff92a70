"""Writing an export: its files, its manifest, and all of it in the place of an earlier one, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from cakeflow.errors import ConfigError, ExportError
from cakeflow.export.card import model_card
from cakeflow.export.check import check_delta, check_gguf, check_lora, check_memory, check_model
from cakeflow.export.delta import write_delta
from cakeflow.export.gguf import write_gguf
from cakeflow.export.lora import write_lora
from cakeflow.export.manifest import MANIFEST, Format, Manifest, require_place
from cakeflow.export.memory import write_memory
from cakeflow.export.options import ExportOptions
from cakeflow.export.questions import questions
from cakeflow.journal.changes import ModuleChange
from cakeflow.journal.journal import Journal
from cakeflow.journal.ledger import Entry
from cakeflow.journal.schema import BatchBody
from cakeflow.models.base import EditableModel
from cakeflow.models.vision import VisionModel
from cakeflow.storage.folders import write_folder
from cakeflow.storage.hashing import file_hash

CARD = "README.md"
TENSOR_FILES = (".safetensors", ".gguf")
"""Endings of files that a manifest has the hashes of."""
Fill = Callable[[Path], None]
"""Fills a folder."""


def export(
    journal: Journal,
    folder: str | Path,
    format: Format = "model",
    *,
    overwrite: bool = False,
    options: ExportOptions = ExportOptions(),
) -> Path:
    """Write the model as the journal has it now: after a rollback, without the batches that were taken back.

    Args:
        journal: Journal of the edited model.
        folder: The export's folder; its ``manifest.json`` says what it was made from, ``README.md`` is its card.
        format: ``model`` is everything, in the Hugging Face format; loaded, it gives the same logits, bit for bit.
            ``delta`` is the edited weights, bit for bit and as small as can be, for ``apply_delta``. ``lora`` is an
            adapter in float32 that PEFT loads onto the base model. The edited weights took the same change in, rounded
            to their type: logits differ by less than the manifest's ``tolerance``. ``memory`` is the modules that were
            put in place, for ``apply_memory``. ``gguf`` is a file for llama.cpp with an Ollama Modelfile: the original
            GGUF file with the edited tensors swapped, or a new one.
        overwrite: Whether an export that is there is replaced, as a whole, when the new one is complete.
        options: How numbers are stored, and what the export is to fit.

    Returns:
        The folder.

    Raises:
        ConfigError: If something is there already, or there is no such format.
        ExportError: If no weight differs from the base (``delta``, ``lora``), a change has full rank (``lora``), the
            format cannot hold the kind of changes that were made, or what was written, loaded and asked again, does not
            answer as the edited model does.
        PolicyError: If a run was stopped before its policy judged it.
        ModelChangedError: If somebody else changed the model since its journal did.
    """
    if format not in FORMATS:
        raise ConfigError(f"format = {format!r}: expected {', '.join(FORMATS)}")
    place = require_place(folder, overwrite=overwrite)
    journal.policies.require_judged()
    journal.memory.check_all(record=False)
    _require_fit(journal, format)
    manifest = Manifest.of(journal, format)
    if format in ("delta", "lora") and not manifest.weights:
        raise ExportError(f"there is no {format} to write: no weight differs from the base; edit first")
    (manifest, fill), texts = FORMATS[format](journal, manifest, options), questions(journal)
    card = model_card(manifest, _entries(journal), _task(journal.model), options.base_of(manifest.model))
    return _put(place, manifest, card, fill, lambda fresh: CHECKS[format](journal, fresh, texts), overwrite=overwrite)


def export_applied(lm: EditableModel, applied: Manifest, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write a whole model that a delta was applied to, with what the delta's manifest says of it.

    Args:
        lm: The model.
        applied: The manifest that ``apply_delta`` returned.
        folder: The export's folder.
        overwrite: As in ``export``.

    Returns:
        The folder.

    Raises:
        ConfigError: If something is there already.
    """
    manifest = applied.model_copy(update={"format": "model", "files": {}})
    fill, card = _model_writer(lm), model_card(manifest, (), _task(lm), ExportOptions().base_of(manifest.model))
    place = require_place(folder, overwrite=overwrite)
    return _put(place, manifest, card, fill, lambda fresh: check_model(lm, fresh, ["The"]), overwrite=overwrite)


def _require_fit(journal: Journal, format: str) -> None:
    """Refuse a format that cannot hold the changes that are in force."""
    if journal.edits and not journal.changes:
        raise ExportError(
            f"format = {format!r}: {journal.edits} facts are in force and the model is unchanged, as it was loaded: "
            "they are put before questions when it is asked. Copy the model itself, or edit the facts with a method "
            "that changes it"
        )
    modules = [change.place for change in journal.changes if isinstance(change, ModuleChange)]
    if modules and len(modules) < len(journal.changes):
        raise ExportError(f"format = {format!r}: weights were changed and modules put in place; no format holds both")
    if (format == "memory") != bool(modules):
        reason = f"modules were put in place at {', '.join(modules)}" if modules else "no module was put in place"
        raise ExportError(f"format = {format!r}: {reason}; export as {'memory' if modules else 'model, delta or lora'}")


def _put(
    place: Path,
    manifest: Manifest,
    card: str,
    fill: Fill,
    check: Callable[[Path], None],
    *,
    overwrite: bool,
) -> Path:
    def write(fresh: Path) -> None:
        fill(fresh)
        (fresh / CARD).write_text(card, encoding="utf-8", newline="\n")
        files = {
            each.relative_to(fresh).as_posix(): file_hash(each)
            for each in sorted(fresh.rglob("*"))
            if each.suffix in TENSOR_FILES
        }
        (fresh / MANIFEST).write_text(manifest.model_copy(update={"files": files}).text, encoding="utf-8", newline="\n")
        check(fresh)

    write_folder(place, write, overwrite=overwrite, check=lambda place: require_place(place, overwrite=overwrite))
    return place


def _entries(journal: Journal) -> list[Entry]:
    """Return the entries of a run's ledger without batches that were rolled back; none if there is no ledger."""
    numbers = {step.number for step in journal}
    entries = journal.store.ledger.entries if journal.store else ()
    return [each for each in entries if not isinstance(each.body, BatchBody) or each.body.batch in numbers]


def _task(lm: EditableModel) -> str:
    """Return the purpose of a model, in the words of the hub."""
    return "image-classification" if isinstance(lm, VisionModel) else "text-generation"


def _model_writer(lm: EditableModel) -> Fill:
    def write(folder: Path) -> None:
        model = cast(PreTrainedModel, lm.model)
        with _as_it_was(model):
            try:
                model.save_pretrained(folder, state_dict=_untied(model))
            except ValueError as error:
                raise ExportError(f"transformers does not write this model: {error}; export a delta") from error
        if model.can_generate():
            settings = model.generation_config
            settings.to_json_file(folder / GENERATION_CONFIG_NAME, use_diff=True, keys_to_pop=["compile_config"])
        lm.preprocessor.save_pretrained(folder)

    return write


@contextmanager
def _as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Put back what saving notes in the config, which the hash of the model covers, and the settings of generation.

    In the body these are the default ones: transformers refuses to write settings that contradict each other.
    """
    config, settings = model.config, model.generation_config if model.can_generate() else None
    before = config.dtype, config.architectures
    if model.can_generate():
        model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        config.dtype, config.architectures = before
        if settings is not None:
            model.generation_config = settings


def _untied(model: PreTrainedModel) -> dict[str, Any]:
    """Return the state dict, with copies of tensors that were tied by hand: loading would not tie them again."""
    tied, storages, state = model.all_tied_weights_keys, set(), model.state_dict()
    for name, tensor in state.items():
        if name not in tied and isinstance(tensor, Tensor) and not tensor.is_meta:
            storage = tensor.untyped_storage().data_ptr()
            state[name] = tensor.clone() if storage in storages else tensor
            storages.add(storage)
    return state


FORMATS: dict[str, Callable[[Journal, Manifest, ExportOptions], tuple[Manifest, Fill]]] = {
    "model": lambda journal, manifest, _: (manifest, _model_writer(journal.model)),
    "delta": write_delta,
    "lora": write_lora,
    "memory": lambda journal, manifest, _: (manifest, write_memory(journal, manifest)),
    "gguf": write_gguf,
}
"""Name -> a function that refuses what cannot be, and returns the manifest with its details and what fills a folder."""
CHECKS: dict[str, Callable[[Journal, Path, Sequence[str]], None]] = {
    "model": lambda journal, folder, texts: check_model(journal.model, folder, texts),
    "delta": check_delta,
    "lora": check_lora,
    "memory": check_memory,
    "gguf": check_gguf,
}
"""Name -> a function of journal, folder and questions that refuses an export that is not the edited model again."""
