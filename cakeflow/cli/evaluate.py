"""``cakeflow evaluate --run RUN``: the edited model of a run, measured without a trace in the run's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cakeflow.cli.words import options_in, take, values_of
from cakeflow.core.config import find_config, model_kind
from cakeflow.core.datamodule import EditDataModule
from cakeflow.core.module import EditModule
from cakeflow.errors import ConfigError
from cakeflow.journal.audit import base_of, entries_of, ledger_of, name_of_base
from cakeflow.journal.ledger import read_entries, requests_in_force
from cakeflow.journal.store import JOURNAL
from cakeflow.models.loading import Loading


@dataclass(frozen=True)
class EditedModel:
    """The run whose edited model is to be evaluated.

    Attributes:
        run: The run folder.
        own_model: Whether the unedited model has the name that the run was started with; else the command names it.
        own_data: Whether the run's own facts are asked; else the command names others.
    """

    run: Path
    own_model: bool
    own_data: bool

    def load_into(self, module: EditModule, folder: Path | None, loading: Loading = Loading()) -> None:
        """Have a module edit the unedited model as the run did, batches that were taken back left out.

        Args:
            module: The module, whose model is not loaded yet.
            folder: Where the evaluation is written.
            loading: How the unedited model is loaded.

        Raises:
            ConfigError: If that is in the run's folder.
            ResumeError: If the model is another one, or a batch leads to other weights.
            LedgerError: If the ledger or a file is not as it was written.
        """
        if folder is not None and folder.resolve().is_relative_to(self.run.resolve()):
            raise ConfigError(
                f"--run_dir {folder} is in the run that is evaluated, which stays as it is; name another one"
            )
        module.adopt(base_of(self.run, None if self.own_model else module.name, loading))
        module.journal.load(self.run / JOURNAL)

    def data(self, settings: Mapping[str, Any]) -> EditDataModule:
        """Return the run's own facts, those taken back left out.

        Args:
            settings: Further arguments of ``EditDataModule``.

        Raises:
            ConfigError: If their texts were not stored.
        """
        requests = requests_in_force(list(read_entries(ledger_of(self.run))))
        if not requests:
            raise ConfigError(
                f"{self.run}: no facts to ask about, or their texts were not stored; name some: --data FILE"
            )
        return EditDataModule(**{**settings, "source": requests})


def _edits_layers(words: Sequence[str]) -> bool:
    """True if no recipe is named, or one of a class that needs layers."""
    return all(model_kind(find_config("method", name)) == "model" for name in values_of("--method", words))


def take_run(words: Sequence[str]) -> tuple[list[str], EditedModel | None]:
    """Return the words of ``evaluate`` as they are without ``--run RUN``, and the run; of other commands None.

    Raises:
        ConfigError: If ``--run`` names no folder.
    """
    rest, runs = take(words, "--run")
    if words[:1] != ["evaluate"] or not runs:
        return list(words), None
    value, options = runs[-1][1], options_in(rest)
    if not value or value.startswith("--"):
        raise ConfigError("--run needs a run folder: cakeflow evaluate --run RUN")
    if {"--config", "--model_config", "--model.layers"}.isdisjoint(options) and _edits_layers(rest):
        rest += ["--model.layers", "auto"]  # none are edited, but a module cannot do without
    elif {"--config", "--model", "--model.base"}.isdisjoint(options):
        rest += ["--model.base", name_of_base(entries_of(Path(value)))]  # other methods have no model by default
    own_model, own_data = (
        {"--config", f"--{kind}", f"--{kind}.{name}"}.isdisjoint(options)
        for kind, name in (("model", "base"), ("data", "source"))
    )
    return rest, EditedModel(Path(value), own_model, own_data)
