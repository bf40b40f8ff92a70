"""Editor: the facade over a Trainer. ``from_pretrained``, ``fit``, ``evaluate``, ``rollback``, ``save_pretrained``."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cakeflow.core.checkpoint import with_safe_checkpoints
from cakeflow.core.config import build_module, find_config, shipped
from cakeflow.core.datamodule import EditDataModule
from cakeflow.core.locate_then_edit import LocateThenEdit
from cakeflow.core.run import FitResult, run_evaluate, run_fit
from cakeflow.errors import ConfigError
from cakeflow.export import Format, export
from cakeflow.journal.journal import Journal
from cakeflow.models.architecture import Architecture
from cakeflow.models.language import LanguageModel

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": 1,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "enable_checkpointing": False,
    "enable_model_summary": False,
}
"""What editing needs of a Trainer; everything else is the user's choice."""


class Editor:
    """Edits facts in a language model.

    Args:
        module: The composition of weighter, allocator, solver and targets, with its model.
        trainer: Arguments of ``lightning.Trainer``: logger, callbacks, accelerator, precision and so on.
    """

    def __init__(self, module: LocateThenEdit, trainer: dict[str, Any] | None = None) -> None:
        self.module = module
        self.module.setup()
        self._trainer = trainer or {}

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | PreTrainedModel = "smollm2-135m",
        method: str | Path = "cake",
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        architecture: Architecture | None = None,
        trainer: dict[str, Any] | None = None,
        **overrides: Any,
    ) -> Editor:
        """An editor for a model, with a method from its config.

        Args:
            model: An embedded name, a hub id, a folder, a GGUF file, or a model object (then ``tokenizer`` too).
            method: A shipped recipe (``cake``, ``alphaedit``, ``memit``, ``memit_seq`` ...) or a YAML file.
            tokenizer: Of a model object.
            architecture: Module paths, for a model whose structure is not recognised.
            trainer: Arguments of ``lightning.Trainer``.
            overrides: Arguments of ``LocateThenEdit`` that win over the configs, e.g. ``layers=[4, 5, 6]``,
                ``targets={"lr": 0.5}``; ``config=FILE`` adds a YAML file (tuned numbers for a model).

        Raises:
            ConfigError: If a name is unknown, before anything is loaded.
        """
        configs = [find_config("method", method)]
        extra = overrides.pop("config", None) or (str(model) if str(model) in shipped("model") else None)
        if extra is not None:
            configs.append(find_config("model", extra))
        elif not overrides.get("layers"):
            known = ", ".join(shipped("model"))
            raise ConfigError("no shipped model config for this model: name the layers to edit, layers=[...], let a "
                              f"trace find them, layers='auto', or give config=FILE; shipped: {known}")  # fmt: skip
        if isinstance(model, PreTrainedModel):
            if tokenizer is None:
                raise ConfigError("a model object needs its tokenizer: Editor.from_pretrained(model, tokenizer=...)")
            overrides["base"] = LanguageModel.wrap(model, tokenizer, architecture)
        else:
            overrides |= {"base": str(model), "architecture": architecture}
        return cls(build_module(configs, **overrides), trainer)

    @property
    def model(self) -> PreTrainedModel:
        """The model; after ``fit``, the edited model."""
        return self.module.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return self.module.lm.tokenizer

    @property
    def journal(self) -> Journal:
        """Every edit batch so far."""
        return self.module.journal

    def fit(
        self, requests: Any, batch_size: int | None = None, *, evaluate: bool = True, run: str | Path | None = None
    ) -> FitResult:
        """Edit facts in place: when this returns, ``editor.model`` states them.

        Args:
            requests: A list of ``EditRequest`` or mappings, a JSON or JSONL file, ``"builtin"`` or a
                ``datasets.Dataset``.
            batch_size: Edits in one batch; None edits all at once.
            evaluate: Whether to measure before and after.
            run: The run folder, where the Trainer's logger has none of its own. If it holds an interrupted run of the
                same experiment, that goes on: the result is, bit for bit, that of a run without interruption.

        Returns:
            Metrics, timings, journal and run folder.

        Raises:
            RequestError: Listing every bad request; the model is not touched.
            ResumeError: If the folder holds another run, saying what differs, or a finished one.
        """
        data = EditDataModule(requests, batch_size)
        return run_fit(self.trainer(run), self.module, data, evaluate=evaluate)

    def evaluate(self, requests: Any, batch_size: int = 16) -> dict[str, float]:
        """Metrics of the model as it is now.

        Args:
            requests: As in ``fit``.
            batch_size: Records scored together.

        Returns:
            Metric name -> value.
        """
        data = EditDataModule(requests, eval_batch_size=batch_size)
        return run_evaluate(self.trainer(), self.module, data, "now")

    def load(self, run: str | Path) -> None:
        """Edit the unedited model as a run did, finished or not: the same bits, in seconds.

        Raises:
            ResumeError: If this is another model, or has edits.
            LedgerError: If the run's files are not those that were written.
        """
        self.journal.load(Path(run) / "journal")

    def rollback(self, steps: int | None = None, *, batch: int | None = None) -> None:
        """Take back the last ``steps`` edit batches (default: all), or one by its number; bit for bit."""
        self.journal.rollback(steps, batch=batch)

    def reverted(self) -> AbstractContextManager[None]:
        """The unedited model for a while: ``with editor.reverted(): ...``."""
        return self.journal.reverted()

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the edited model, its tokenizer and a model card in the Hugging Face format: ``export`` as a model."""
        self.export(folder, overwrite=overwrite)

    def export(self, folder: str | Path, format: Format = "model", *, overwrite: bool = False) -> Path:
        """Write the edited model whole (``model``), as a ``delta`` to its base, or as a ``lora`` adapter.

        See ``cakeflow.export.export``.
        """
        return export(self.journal, folder, format, overwrite=overwrite)

    def trainer(self, run: str | Path | None = None) -> L.Trainer:
        """A Trainer with the arguments given to this editor.

        Args:
            run: The run folder.

        Raises:
            ConfigError: If the arguments have a logger with a folder of its own.
        """
        if run is not None and self._trainer.get("logger") not in (None, True):
            raise ConfigError(
                f"run={str(run)!r}, but the Trainer's logger has a folder of its own; leave out one of them"
            )
        chosen = {**TRAINER_DEFAULTS, **self._trainer}
        if chosen.get("logger") in (None, True):
            chosen["logger"] = default_logger(run)
        chosen["callbacks"] = with_progress_bar(chosen.get("callbacks"), chosen.get("enable_progress_bar"))
        return with_safe_checkpoints(L.Trainer(**chosen))


def default_logger(run: str | Path | None = None) -> CSVLogger:
    """Metrics as CSV in the run folder: the one that is named, or ``runs/cakeflow/version_N``."""
    if run is None:
        return CSVLogger("runs", name="cakeflow")
    return CSVLogger(Path(run).parent, name="", version=Path(run).name)


def with_progress_bar(callbacks: Any, enabled: bool | None) -> list[Callback]:
    """The user's callbacks, and the progress bar that shares the terminal with ours unless there is one."""
    chosen = [callbacks] if isinstance(callbacks, Callback) else list(callbacks or [])
    if enabled is not False and not any(isinstance(callback, ProgressBar) for callback in chosen):
        chosen.append(TQDMProgressBar())
    return chosen
