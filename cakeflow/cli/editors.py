"""The editor of a command: its model and method are those that are named, or else those of the run it works on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cakeflow.cli.words import options_in, values_of
from cakeflow.core.config import build_module, load_with
from cakeflow.editor import Editor
from cakeflow.errors import ConfigError
from cakeflow.journal.audit import entries_of, loading_of, name_of_base
from cakeflow.journal.ledger import Entry, bodies
from cakeflow.journal.schema import RunBody
from cakeflow.models.loading import Loading

MODEL, METHOD = "smollm2-135m", "cake"
"""Those of a command that names none and works on no run."""
REPLACED = "{} belong to --method, which replaces the method on record"


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
        raise ConfigError(REPLACED.format("--model_config and --layers"))
    return Editor(load_with(build_module([method_on_record(entries)], base=base, **values), known), trainer)


def method_on_record(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return class and arguments of the method that the ledger of a run names.

    Raises:
        ConfigError: If it does not.
    """
    recorded = bodies(entries, RunBody)[-1].method
    if not recorded:
        raise ConfigError(
            "the run's ledger does not say how its method was built (by Python, or an older cakeflow); name it, "
            "--method NAME with --model_config or --layers, or use the editor in Python: Editor(module)"
        )
    return recorded


def with_record(words: Sequence[str]) -> list[str]:
    """Return the words of ``fit --from RUN`` with the run's method and, unless another is named, its model.

    Words that name a method, and those of other commands, stay as they are.

    Raises:
        ConfigError: As ``method_on_record``, and if numbers are named for a method that is on record.
        LedgerError: If the ledger names no model.
    """
    words = [re.sub(r"^--from(?==|$)", "--from_run", word) for word in words]
    options = options_in(words)
    if words[:1] != ["fit"] or "--from_run" not in options or options & {"--method", "--config", "--model.class_path"}:
        return words
    if "--model_config" in options:
        raise ConfigError(REPLACED.format("--model_config"))
    words = [re.sub(r"^--model(?==|$)", "--model.base", word) for word in words]
    entries = entries_of(Path(values_of("--from_run", words)[-1]))
    named = values_of("--model.base", words)
    added = ["--config", json.dumps({"model": method_on_record(entries)})]
    added += [] if named else ["--model.base", name_of_base(entries)]
    loading = loading_of(entries, named[-1] if named else None)
    return [words[0], *added, *(f"--loading.{name}={value}" for name, value in loading.items()), *words[1:]]
