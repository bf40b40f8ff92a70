"""Editor: the facade over a Trainer. ``from_pretrained``, ``fit``, ``evaluate``, ``rollback``, ``save_pretrained``."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cakeflow.architecture import Architecture
from cakeflow.batch import encode_batch
from cakeflow.config import build_module, find_config, shipped
from cakeflow.contexts import Contexts
from cakeflow.data import EditDataModule
from cakeflow.errors import ConfigError
from cakeflow.evaluation import check_texts, warn_of_known
from cakeflow.files import write_text
from cakeflow.journal import Journal
from cakeflow.model import LanguageModel
from cakeflow.module import EditModule

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": 1,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "enable_checkpointing": False,
    "enable_model_summary": False,
}
"""What editing needs of a Trainer; everything else is the user's choice."""


@dataclass(frozen=True)
class Run:
    """What one ``fit`` did.

    Attributes:
        before: Metrics of the model as it was, by name.
        after: Metrics of the edited model.
        timings: Seconds per phase.
        peaks: Most memory in each phase beyond the unedited model, in bytes; nan where it cannot be known.
        logged: Everything that was logged while editing, as of the last batch: what ``report.plot_layers`` draws.
        protocol: Names how the metrics were measured; numbers with different ones are not comparable.
        journal: Every edit batch of this model so far.
        folder: Where metrics, config and journal lie, if the Trainer's logger has a folder.
    """

    before: dict[str, float]
    after: dict[str, float]
    timings: dict[str, float]
    peaks: dict[str, float]
    logged: dict[str, float]
    protocol: str
    journal: Journal
    folder: Path | None


class Editor:
    """Edits facts in a language model.

    Args:
        module: The composition of weighter, allocator, solver and targets, with its model.
        trainer: Arguments of ``lightning.Trainer``: logger, callbacks, accelerator, precision and so on.
    """

    def __init__(self, module: EditModule, trainer: dict[str, Any] | None = None) -> None:
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
            overrides: Arguments of ``EditModule`` that win over the configs, e.g. ``layers=[4, 5, 6]``,
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

    def fit(self, requests: Any, batch_size: int | None = None, *, evaluate: bool = True) -> Run:
        """Edit facts in place: when this returns, ``editor.model`` states them.

        Args:
            requests: A list of ``EditRequest`` or mappings, a JSON or JSONL file, ``"builtin"`` or a
                ``datasets.Dataset``.
            batch_size: Edits in one batch; None edits all at once.
            evaluate: Whether to measure before and after.

        Returns:
            Metrics, timings, journal and run folder.

        Raises:
            RequestError: Listing every bad request; the model is not touched.
        """
        data = EditDataModule(requests, batch_size)
        return run_fit(self.trainer(), self.module, data, evaluate=evaluate)

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

    def rollback(self, steps: int | None = None) -> None:
        """Take back the last ``steps`` edit batches (default: all), bit for bit."""
        self.journal.rollback(steps)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the edited model and its tokenizer in the Hugging Face format (safetensors)."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def trainer(self) -> L.Trainer:
        """A Trainer with the arguments given to this editor."""
        chosen = {**TRAINER_DEFAULTS, "logger": default_logger(), **self._trainer}
        chosen["callbacks"] = with_progress_bar(chosen.get("callbacks"), chosen.get("enable_progress_bar"))
        return L.Trainer(**chosen)


def default_logger() -> CSVLogger:
    """Metrics as CSV under ``runs/cakeflow/version_N``, which is also the run folder."""
    return CSVLogger("runs", name="cakeflow")


def with_progress_bar(callbacks: Any, enabled: bool | None) -> list[Callback]:
    """The user's callbacks, and the progress bar that shares the terminal with ours unless there is one."""
    chosen = [callbacks] if isinstance(callbacks, Callback) else list(callbacks or [])
    if enabled is not False and not any(isinstance(callback, ProgressBar) for callback in chosen):
        chosen.append(TQDMProgressBar())
    return chosen


def run_fit(trainer: L.Trainer, module: EditModule, data: EditDataModule, *, evaluate: bool = True) -> Run:
    """Measure, edit, measure again and write the journal: what ``Editor.fit`` and ``cakeflow fit`` both do."""
    module.timings.clear()
    module.peaks.clear()
    before: dict[str, float] = {}
    if evaluate:
        encode_batch(module.lm, data.requests, module.contexts or Contexts())  # refuses what cannot be edited
        before = run_evaluate(trainer, module, data, "before")
        check_texts(module.outcomes)
        warn_of_known(module.outcomes)
    module.stage = "after"
    with _expected_warnings():
        trainer.fit(
            module,
            train_dataloaders=data.train_dataloader(),
            val_dataloaders=data.val_dataloader() if evaluate else None,
        )
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if evaluate and module.evaluated != len(module.journal):  # the last validation came before the last batch
        run_evaluate(trainer, module, data, "after")
    after, timings, peaks = _metrics(trainer, "after"), dict(module.timings), dict(module.peaks)
    folder = run_folder(trainer)
    if folder is not None:
        module.journal.save(folder / "journal")
        if evaluate:
            _write_outcomes(folder, "after", module)
        found = {
            "metrics": {"before": _without_nan(before), "after": _without_nan(after)},
            "protocol": module.evaluation.id,
            "edits": len(data.requests),
            "timings": timings,
            "peaks": _without_nan(peaks),
        }
        write_text(folder / "run.json", json.dumps({**module.describe(), **found}, indent=1, ensure_ascii=False))
    return Run(before, after, timings, peaks, logged, module.evaluation.id, module.journal, folder)


def run_evaluate(trainer: L.Trainer, module: EditModule, data: EditDataModule, stage: str) -> dict[str, float]:
    """Score the records through the Trainer and log the metrics as ``stage/...``."""
    module.check_records(data.requests)
    module.stage = stage
    with _expected_warnings():
        trainer.validate(module, dataloaders=data.val_dataloader(), verbose=False)
    folder = run_folder(trainer)
    if folder is not None:
        _write_outcomes(folder, stage, module)
    return _metrics(trainer, stage)


def run_folder(trainer: L.Trainer) -> Path | None:
    """Where a Trainer's logger keeps its files, if it does."""
    return Path(trainer.log_dir) if trainer.log_dir and trainer.loggers else None


def _without_nan(numbers: dict[str, float]) -> dict[str, float | None]:
    """JSON knows no nan."""
    return {name: None if value != value else value for name, value in numbers.items()}


def _write_outcomes(folder: Path, stage: str, module: EditModule) -> None:
    """What every record answered, one line each."""
    lines = (json.dumps(row, ensure_ascii=False) for row in module.outcomes)
    write_text(folder / f"{stage}.jsonl", "".join(f"{line}\n" for line in lines))


def _metrics(trainer: L.Trainer, stage: str) -> dict[str, float]:
    prefix = f"{stage}/"
    return {
        name.removeprefix(prefix): float(v) for name, v in trainer.callback_metrics.items() if name.startswith(prefix)
    }


@contextmanager
def _expected_warnings() -> Iterator[None]:
    """Silences what Lightning rightly says of training and is meant here: no optimizer, no workers, evaluation mode."""
    with warnings.catch_warnings():
        for message in (
            "configure_optimizers",
            "does not have many workers",
            "in eval mode",
            "have no `val_dataloader`",
            "training_step. returned",
            ".isinstance.treespec, LeafSpec",
        ):
            warnings.filterwarnings("ignore", message=f".*{message}")
        yield
