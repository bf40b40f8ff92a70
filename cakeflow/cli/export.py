"""``cakeflow export`` and ``cakeflow apply``: a run becomes an export, a delta becomes a model."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from cakeflow.export.delta import apply_delta
from cakeflow.export.formats import export, export_applied
from cakeflow.export.manifest import Format, Manifest, require_place
from cakeflow.journal.audit import replay
from cakeflow.models.loading import load_model


def run_export(
    run: Path, out: Path, format: Format = "model", model: str | None = None, overwrite: bool = False
) -> Path:
    """Write what a run made of its model: the whole model with a card, the edited weights alone, or a LoRA adapter.

    Args:
        run: A run folder.
        out: Folder for the export.
        format: ``model``; ``delta``, for ``cakeflow apply``; or ``lora``, which PEFT loads.
        model: The base model, where it is not found under the name that the run had for it.
        overwrite: Replace an export that is there.

    Raises:
        RunFolderError: If the folder is none of a run, or its ledger is broken.
        ResumeError: If this is another model, or the edits come out otherwise on this machine.
        ExportError: If the run's edits are of full rank (``lora``).
    """
    require_place(out, overwrite=overwrite)
    journal = replay(run, model)
    place = export(journal, out, format, overwrite=overwrite)
    Console().print(f"written to {place}", soft_wrap=True, markup=False)
    return place


def run_apply(delta: Path, model: str, out: Path, overwrite: bool = False) -> Path:
    """Put a delta into the model that it was made from, and write the edited model.

    Args:
        delta: A folder that ``cakeflow export --format delta`` wrote.
        model: The base model: an embedded name, a hub id, a folder or a GGUF file.
        out: Folder for the edited model.
        overwrite: Replace an export that is there.

    Raises:
        ExportError: If this is another model, or the delta was changed.
    """
    dtype = Manifest.read(delta).dtype.removeprefix("torch.")
    require_place(out, overwrite=overwrite)
    lm = load_model(model, dtype=dtype)
    place = export_applied(lm, apply_delta(lm, delta), out, overwrite=overwrite)
    Console().print(f"written to {place}", soft_wrap=True, markup=False)
    return place
