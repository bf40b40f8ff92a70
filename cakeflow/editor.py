"""The facade over a Trainer: ``from_pretrained``, ``fit``, ``evaluate``, ``rollback``, ``save_pretrained``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torchmetrics import Metric
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cakeflow.allocators.base import Allocator
from cakeflow.callbacks import NeutralText, OutcomeCheck
from cakeflow.core.checkpoint import with_safe_checkpoints
from cakeflow.core.config import build_module, configs_of, find_config, load_with, model_kind
from cakeflow.core.contracts import Outcome
from cakeflow.core.datamodule import EditDataModule
from cakeflow.core.folder import RunLogger
from cakeflow.core.locate_then_edit import LocateThenEdit
from cakeflow.core.loggers import names_folder, with_run_folder
from cakeflow.core.module import EditModule
from cakeflow.core.progress import as_list, with_progress_bar
from cakeflow.core.recorded import RecordedRun
from cakeflow.core.reproduction import Reproduction, reproduce
from cakeflow.core.run import EvaluationResult, FitResult, run_evaluate, run_fit
from cakeflow.core.statistics import Statistics
from cakeflow.core.strategy import on_whole_model, together
from cakeflow.core.trainer import check_settings, check_trainer, quiet, with_ranks
from cakeflow.core.undo import facts_about, undo_facts
from cakeflow.data.contexts import Contexts
from cakeflow.data.request import FactToken
from cakeflow.errors import ConfigError
from cakeflow.evaluation.evaluation import Evaluation
from cakeflow.evaluation.outcome import free_answers
from cakeflow.export.formats import export
from cakeflow.export.hub import export_to_hub
from cakeflow.export.manifest import Format
from cakeflow.export.options import ExportOptions
from cakeflow.journal.journal import Journal
from cakeflow.journal.steps import EditStep
from cakeflow.journal.store import JOURNAL
from cakeflow.models.architecture import Architecture
from cakeflow.models.base import EditableModel
from cakeflow.models.language import LanguageModel
from cakeflow.models.vision import VisionModel
from cakeflow.solvers.base import Solver
from cakeflow.targets.base import TargetSearch
from cakeflow.weighters.base import Weighter

Part = Mapping[str, Any]
"""A part of a method as a config has it: some of its settings, or ``class_path`` and ``init_args``."""
TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": 1,
    "devices": 1,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "enable_checkpointing": False,
    "enable_model_summary": False,
}
"""What editing needs of a Trainer; everything else is the user's choice."""
CHECKS: tuple[Callable[[], Callback], ...] = (OutcomeCheck, partial(NeutralText, every=None))
"""Makers of the callbacks that measure every run's outcome and side effects."""
OVERRIDES = set(signature(LocateThenEdit).parameters) - {"base", "architecture"}
"""Arguments of a method that ``from_pretrained`` takes."""


class Editor:
    """Edits facts in a language model; with a Trainer of several ranks every one of them makes all calls.

    Args:
        module: The edit method with its model.
        trainer: A ``lightning.Trainer``, or its arguments: logger, callbacks, accelerator, max_time and so on. From
            arguments every call gets a Trainer of its own; a Trainer itself serves one ``fit``.

    Raises:
        ConfigError: If a setting of the Trainer would split the run, cut it short or change the model
            (``check_trainer``); no model is loaded yet.
    """

    def __init__(self, module: EditModule, trainer: L.Trainer | Mapping[str, Any] | None = None) -> None:
        self.module = module
        self._trainer = trainer if isinstance(trainer, L.Trainer) else dict(trainer or {})
        if isinstance(self._trainer, L.Trainer):
            check_trainer(self._trainer, edits=False)
        else:
            check_settings(self._trainer)
        self.module.setup()
        self.module.obey(_callbacks(self._trainer))

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | nn.Module = "smollm2-135m",
        method: str | Path = "cake",
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        processor: Any = None,
        architecture: Architecture | None = None,
        config: str | Path | None = None,
        trainer: L.Trainer | Mapping[str, Any] | None = None,
        layers: Sequence[int] | Literal["auto"] | None = None,
        site: str | None = None,
        weighter: Weighter | Part | None = None,
        allocator: Allocator | Part | None = None,
        solver: Solver | Part | None = None,
        targets: TargetSearch | Part | str | None = None,
        statistics: Statistics | Part | None = None,
        contexts: Contexts | Part | None = None,
        scores: dict[int, float] | None = None,
        history: bool | None = None,
        seed: int | None = None,
        dtype: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        moments: Mapping[int, Tensor] | None = None,
        evaluation: Evaluation | Part | None = None,
        metrics: Sequence[Metric | Part] | None = None,
        memory_budget: float | None = None,
        record_texts: bool | None = None,
        private: bool | None = None,
        max_relative_update: float | None = None,
        min_arrival: float | None = None,
        on_low_arrival: Outcome | None = None,
        dequantize: bool | None = None,
        tile: int | None = None,
        fact_token: FactToken | None = None,
        chat: bool | None = None,
        rounds: int | None = None,
        repairs: int | None = None,
        reread_keys: int | None = None,
        end_of_text: bool | None = None,
        **further: Any,
    ) -> Editor:
        """An editor for a model, with a method from its config.

        Args:
            model: An embedded name, a hub id, a folder, a GGUF file, or a model object (then ``tokenizer`` too), also
                one inside ``torch.compile`` or ``DataParallel``.
            method: A shipped recipe (``cake``, ``alphaedit``, ``memit``, ``memit_seq`` ...) or a YAML file.
            tokenizer: Tokenizer of a model object.
            processor: Image processor of a model object that classifies images.
            architecture: Module paths, for a model whose structure is not recognized.
            config: Tuned numbers for the model: a shipped name or a YAML file; by default the one of the model's name.
            trainer: A ``lightning.Trainer`` or its arguments.
            layers: See ``LocateThenEdit``; this and the following arguments win over the configs. A part of the method
                is an object or, merged into the configured part, a mapping: ``targets={"lr": 0.5}``.
            site: The projection of each layer that is edited.
            weighter: How much each layer matters.
            allocator: Which share of the remaining residual each layer takes.
            solver: The closed-form weight change.
            targets: The search for target values; also a shipped one by name, ``short``.
            statistics: How second moments are collected.
            contexts: Texts around each prompt.
            scores: Causal score of each layer.
            history: Whether earlier edits' keys are preserved.
            seed: Seed of the sampled contexts.
            dtype: Type of the weights.
            model_kwargs: Further arguments of ``AutoModelForCausalLM.from_pretrained``.
            moments: Known second moments, layer -> C.
            evaluation: What the model is asked when it is evaluated.
            metrics: Further metrics of every evaluation.
            memory_budget: Most memory in GiB beyond the model.
            record_texts: Whether the ledger has the texts of the requests.
            private: Whether only their owner can read the run folders that are made.
            max_relative_update: Largest update of a layer by one batch, in norms of its weight.
            min_arrival: Least part of each fact's searched change that has to arrive.
            on_low_arrival: ``warn`` of facts below it, or undo the batch with an ``error``.
            dequantize: Whether quantized projections of these layers are replaced by plain ones.
            tile: Most facts that are searched together: what is spread over ranks.
            fact_token: Token at which a fact is written.
            chat: Whether every fact is written as a question in a chat too.
            rounds: Most further walks over the facts of a batch that did not take.
            repairs: Most further batches behind each one, of its facts and earlier ones that do not take.
            reread_keys: Batches after which the keys of all earlier facts are read again; 0 never does.
            end_of_text: Whether the end of the text is taught with the target.
            further: Arguments that only the method's own class has, such as ``unrelated`` images.

        Raises:
            ConfigError: If a name is unknown, before anything is loaded.
            TypeError: If the default method has no such argument.
        """
        values = {name: value for name, value in locals().items() if name in OVERRIDES and value is not None} | further
        if further and model_kind(find_config("method", method)) == "model":  # the default method's are named above
            raise TypeError(f"Editor.from_pretrained() got an unexpected keyword argument {next(iter(further))!r}")
        configs = configs_of(method, str(model), config, bool(layers), targets)
        if isinstance(targets, str):
            del values["targets"]
        if not isinstance(model, str | Path):
            values["base"] = _wrapped(model, tokenizer, processor, architecture)
        else:
            values |= {"base": str(model)} | ({"architecture": architecture} if architecture else {})
        kwargs = values.pop("model_kwargs", {})
        return cls(load_with(build_module(configs, **values), kwargs), trainer)

    @property
    def model(self) -> PreTrainedModel:
        """The model; after ``fit``, the edited model."""
        model: PreTrainedModel = self.module.model
        return model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return self.module.lm.tokenizer

    @property
    def journal(self) -> Journal:
        """Every edit batch so far."""
        return self.module.journal

    def fit(
        self, requests: Any, batch_size: int | None = None, *, evaluate: bool = True, run_dir: str | Path | None = None
    ) -> FitResult:
        """Edit facts in place: when this returns, ``editor.model`` states them.

        Args:
            requests: A list of ``EditRequest`` or mappings, a JSON or JSONL file, ``"builtin"`` or a
                ``datasets.Dataset``.
            batch_size: Edits in one batch; None edits all at once.
            evaluate: Whether to evaluate before and after.
            run_dir: The run folder, if the Trainer's logger has none of its own. If it holds an interrupted run of the
                same experiment, that goes on: the result is, bit for bit, that of a run without interruption.

        Returns:
            Metrics, timings, journal and run folder.

        Raises:
            RequestError: Listing every bad request; the model is not touched.
            ResumeError: If the folder holds another run, naming the differences, or a finished one.
        """
        data = EditDataModule(requests, batch_size)
        return run_fit(self.trainer(run_dir, checks=evaluate), self.module, data, evaluate=evaluate)

    def evaluate(self, requests: Any, batch_size: int = 16) -> EvaluationResult:
        """Evaluate the model as it is now.

        Args:
            requests: As in ``fit``.
            batch_size: Requests scored together.

        Returns:
            Metrics, and the answers to all prompts of every request.
        """
        data = EditDataModule(requests, eval_batch_size=batch_size)
        return run_evaluate(self.trainer(), self.module, data, "now")

    def ask(self, prompts: str | Sequence[str], *, chat: bool = False, tokens: int = 24) -> Any:
        """Return the free answer of the model as it is now.

        Args:
            prompts: The beginning of a sentence, or a question in a chat; or several.
            chat: Whether to ask as the user's turn of a chat.
            tokens: Most tokens of an answer; a completion ends earlier where a reader would end it.

        Returns:
            A text, or a list of them for several prompts.

        Raises:
            ConfigError: If it is to be a chat, and the tokenizer has no chat template; if ``tokens`` is no whole number
                from 1 on.
            RequestError: Naming every prompt that is no valid text, or longer than the model.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        answers = [text.strip() for text in free_answers(self.module.lm, texts, tokens, chat, self.module.max_bytes)]
        return answers[0] if isinstance(prompts, str) else answers

    def load(self, run_dir: str | Path) -> None:
        """Edit the unedited model as a run did, finished or not: the same bits, in seconds.

        Raises:
            ResumeError: If this is another model, or has edits.
            LedgerError: If the run's files are not as they were written.
            PolicyError: If the run was stopped before its policy judged it, or breaks a policy of this editor.
        """
        self.journal.load(Path(run_dir) / JOURNAL)

    def rollback(self, steps: int | None = None, *, batch: int | None = None) -> None:
        """Take back the last ``steps`` edit batches (default: all), or one by its number; bit for bit."""
        with together(self.module):
            self.journal.rollback(steps, batch=batch)

    def undo(self, name: str) -> list[dict[str, str]]:
        """Take back single facts, also from inside a batch; later batches and the batch's other facts stay.

        The facts are walked back to the values that they would have without their batch, by the method's own solver;
        the journal has that as a batch of its own.

        Args:
            name: A subject, or a prompt with its subject.

        Returns:
            For each fact its ``prompt``, the ``target`` that it had, and the model's answers ``before`` and ``after``.

        Raises:
            ConfigError: If no fact in force is that, or the method takes back whole batches only.
        """
        return self.take_back(facts_about(self.journal, name))

    def take_back(self, facts: Sequence[tuple[EditStep, int]]) -> list[dict[str, str]]:
        """Take back facts, each by its batch in the journal and its place there; returns and raises as ``undo``."""
        edited = with_ranks({**TRAINER_DEFAULTS, **({} if isinstance(self._trainer, L.Trainer) else self._trainer)})
        arguments = {**edited, "logger": False, "callbacks": [], "enable_progress_bar": False}
        prompts = [step.requests[i].text for step, i in facts]
        before = self.ask(prompts)
        undo_facts(lambda: L.Trainer(**arguments), self.module, facts)
        targets, after = [step.requests[i].target_new for step, i in facts], self.ask(prompts)
        names = ("prompt", "target", "before", "after")
        return [dict(zip(names, row, strict=True)) for row in zip(prompts, targets, before, after, strict=True)]

    def reproduce(self, run: str | Path, data: Any = None, *, run_dir: str | Path | None = None) -> Reproduction:
        """Search and solve a finished run anew on the unedited model, and compare it with its record.

        See ``core.reproduction.reproduce``; ``data`` names the requests where the ledger has their hashes only.
        """
        return reproduce(RecordedRun.read(Path(run), data), self.module, self.trainer(run_dir))

    def reverted(self) -> AbstractContextManager[None]:
        """The unedited model for a while: ``with editor.reverted(): ...``."""
        return self.journal.reverted()

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the edited model, its tokenizer and a model card in the Hugging Face format: ``export`` as a model."""
        self.export(folder, overwrite=overwrite)

    def export(self, folder: str | Path, format: Format = "model", *, overwrite: bool = False, **options: Any) -> Path:
        """Write the edited model whole (``model``, ``gguf``), as a ``delta`` to its base, or as a ``lora`` adapter.

        See ``cakeflow.export.export``; ``options`` are the fields of ``ExportOptions``.
        """
        words: dict[str, Any] = {"overwrite": overwrite, "options": ExportOptions(**options)}
        return on_whole_model(self.module, lambda journal: export(journal, folder, format, **words))

    def push_to_hub(self, repo: str, format: Format = "model", **options: Any) -> str:
        """Export and upload the edited model; return the commit's address. See ``cakeflow.export.export_to_hub``."""
        return on_whole_model(self.module, lambda journal: export_to_hub(journal, repo, format, **options))

    def trainer(self, run_dir: str | Path | None = None, *, checks: bool = False) -> L.Trainer:
        """The Trainer that was given to this editor, or one with the arguments that were.

        Args:
            run_dir: The run folder.
            checks: Whether a Trainer made here measures outcome and side effects of a run (``with_checks``).

        Raises:
            ConfigError: If the Trainer has a logger with a folder of its own.
        """
        arguments = {} if isinstance(self._trainer, L.Trainer) else with_ranks({**TRAINER_DEFAULTS, **self._trainer})
        if run_dir is not None and (not arguments or names_folder(arguments.get("logger"))):
            raise ConfigError(
                f"run_dir={str(run_dir)!r}, but the Trainer's logger has a folder of its own; leave out one of them"
            )
        if isinstance(self._trainer, L.Trainer):
            return with_safe_checkpoints(self._trainer)
        if arguments.get("logger") in (None, True):
            arguments["logger"] = default_logger(run_dir)
        callbacks = with_checks(arguments.get("callbacks")) if checks else arguments.get("callbacks")
        arguments["callbacks"] = with_progress_bar(callbacks, arguments.get("enable_progress_bar"))
        with quiet():
            trainer = L.Trainer(**arguments)
        return with_safe_checkpoints(with_run_folder(trainer, partial(default_logger, run_dir)))


def _wrapped(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, processor: Any, architecture: Architecture | None
) -> EditableModel:
    """A model object with what its inputs need."""
    if processor is not None:
        return VisionModel.wrap(model, processor)
    if tokenizer is None:
        raise ConfigError(
            "a model object needs its tokenizer, Editor.from_pretrained(model, tokenizer=...), or, where it classifies "
            "images, its image processor: processor=..."
        )
    return LanguageModel.wrap(model, tokenizer, architecture)


def default_logger(run_dir: str | Path | None = None) -> CSVLogger:
    """Metrics as CSV in the run folder: the one that is named, or ``runs/cakeflow/version_N``."""
    if run_dir is None:
        return RunLogger("runs", name="cakeflow")
    return RunLogger(Path(run_dir).parent, name="", version=Path(run_dir).name)


def with_checks(callbacks: Any) -> list[Callback]:
    """The user's callbacks, and those that measure outcome and side effects of a run unless there are some."""
    chosen, checks = as_list(callbacks), [make() for make in CHECKS]
    return [*chosen, *(check for check in checks if not any(isinstance(each, type(check)) for each in chosen))]


def _callbacks(trainer: L.Trainer | Mapping[str, Any]) -> list[Callback]:
    return as_list(trainer.callbacks if isinstance(trainer, L.Trainer) else trainer.get("callbacks"))  # type: ignore[attr-defined]
