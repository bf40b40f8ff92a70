"""The editor of a command: its model and method are those that are named, or else those of the run it works on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cakeflow.core.config import build_module, load_with
from cakeflow.editor import Editor
from cakeflow.errors import ConfigError
from cakeflow.journal.audit import loading_of, name_of_base
from cakeflow.journal.ledger import Entry, bodies
from cakeflow.journal.schema import RunBody
from cakeflow.models.loading import Loading

MODEL, METHOD = "smollm2-135m", "cake"
"""Those of a command that names none and works on no run."""


def editor_for(
    entries: Sequence[Entry],
    model: str | None,
    method: str | None,
    model_config: str | None,
    layers: list[int] | None,
    loading: Loading,
    trainer: Mapping[str, Any] | None = None,
    **values: Any,
) -> Editor:
    """Return an editor with the model and the method that a command names, by default those of a run.

    Args:
        entries: The ledger of the run that the command works on or goes on from; empty for a new one.
        model: Name of the unedited model.
        method: A shipped recipe or a YAML file.
        model_config: Tuned numbers for the model, by name or as a YAML file.
        layers: Layers to edit.
        loading: How the model is loaded.
        trainer: Settings of the Trainer.
        values: Arguments of the method beside these.

    Raises:
        ConfigError: If the run does not say its method, or numbers are named for a method that is on record.
        LedgerError: If the ledger names no model.
    """
    base = model or (name_of_base(entries) if entries else MODEL)
    known = loading_of(entries, model, loading) if entries else loading.arguments()
    if method is not None or not entries:
        return Editor.from_pretrained(
            base, method or METHOD, config=model_config, layers=layers, trainer=trainer, model_kwargs=known, **values
        )
    if model_config is not None or layers is not None:
        raise ConfigError("--model_config and --layers belong to --method, which replaces the method on record")
    recorded = bodies(entries, RunBody)[-1].method
    if not recorded:
        raise ConfigError(
            "the run's ledger does not say how its method was built (by Python, or an older cakeflow); name it, "
            "--method NAME with --model_config or --layers, or use the editor in Python: Editor(module)"
        )
    return Editor(load_with(build_module([recorded], base=base, **values), known), trainer)
