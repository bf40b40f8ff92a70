"""The base of every edit method: a Lightning module whose training step is one edit batch."""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, Generic, final

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import Self, TypeVar

from cakeflow import ranks
from cakeflow.core.callback import EditCallback, LayerEdit
from cakeflow.core.checkpoint import with_safe_checkpoints
from cakeflow.core.folder import check_run_folder, require_run_folder, run_folder
from cakeflow.core.identity import run_body
from cakeflow.core.loggers import with_run_folder
from cakeflow.core.memory import PeakMemory
from cakeflow.core.restore_state import RestoreState
from cakeflow.core.strategy import check_ranks, join, require_same_run
from cakeflow.core.trainer import check_trainer, end_on_sigterm, float32_by_default
from cakeflow.data.request import EditRequest
from cakeflow.errors import ConfigError, EditError, NotTakenWarning, NumericalError, PolicyError
from cakeflow.evaluation.evaluation import Evaluation, Questions
from cakeflow.evaluation.outcome import Outcome
from cakeflow.forward.packing import GIB
from cakeflow.forward.tokens import EditBatch
from cakeflow.journal.journal import Journal
from cakeflow.journal.model_state import require_plain_mode
from cakeflow.journal.policy import Policy
from cakeflow.journal.schema import EvaluatedRequest, EvaluationBody, MomentPoint
from cakeflow.journal.steps import EditStep, request_hash
from cakeflow.journal.store import JOURNAL
from cakeflow.models.base import EditableModel
from cakeflow.models.language import LanguageModel
from cakeflow.storage.atomic import make_private

B = TypeVar("B", bound=EditBatch, default=Any)
"""The batches of a method: requests with what it needs of them, such as tokens."""


class EditModule(Questions, L.LightningModule, ABC, Generic[B]):
    """The base of edit methods: model, journal, evaluation and phases; a subclass says how a batch is edited.

    Subclasses define ``settings``, ``encode``, ``prepare`` and ``edit``, and ``finish`` if something is left to do when
    a run ends. Whatever changes the model goes through ``journal.apply``: then batches are whole or not there, stored,
    resumed, rolled back and exported.

    Attributes:
        lm: The model.
        model: Its ``nn.Module``, which Lightning moves to its device.
        journal: Every change that was made to it.
        stage: Name under which metrics are logged: ``before`` or ``after`` an edit, ``now`` without one.
        answers: The answers of every request in the last evaluation.
        metrics_at: Stage -> metrics.
        evaluated: Number of batches that were done at the last evaluation.
        run_facts: Hash of each fact of the last run -> whether it was edited, and not repeated from an interrupted one.
        timings: Phase -> seconds.
        peaks: Phase -> most bytes beyond the model.
        max_bytes: Most bytes beyond the model that edits and evaluations may take; None for no limit.
        inputs: Name -> SHA-256 of what ``prepare`` measured or read for the batches; the ledger has it with each batch,
            and a run does not go on with anything else.
        convergence: Layer -> how its second moment settled, where the method collected one.
        complete: Whether all batches of the last run were edited.
        first_step: Number of batches in the journal before the last run.
        further: Metrics that callbacks add to the evaluation that is running.
        method: The config that the module was built from, without the model; empty if it was built of objects.
        outcome: What became of the last run, where the model was asked freely (``callbacks.OutcomeCheck``).

    Args:
        base: An embedded name, hub id, folder or GGUF file, or a ``LanguageModel``. Names load on first use.
        evaluation: What the model is asked.
        metrics: Further metrics of every evaluation, which get the fields of ``PromptScores``, ``texts`` and
            ``references`` by the names of their arguments; logged by class name in lower case.
        loading: Further arguments of ``load_model``.
        record_texts: Whether the ledger has the texts of the requests; it always has their hashes.
        private: Whether only their owner can read the run folders that are made.
    """

    journal: Journal

    def __init__(
        self,
        base: str | LanguageModel,
        evaluation: Evaluation,
        metrics: Sequence[Metric],
        loading: dict[str, Any],
        *,
        record_texts: bool = True,
        private: bool = True,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # a checkpoint has the edited places only
        self.evaluation, self.metrics = evaluation, evaluation.metrics(metrics)
        self._requested = {type(metric).__name__.lower() for metric in metrics}
        self._requested |= {"fluency"} if getattr(evaluation, "texts_every", 0) else set()
        self.name = base.name if isinstance(base, EditableModel) else str(base)
        self.record_texts, self.private, self._base, self._loading = record_texts, private, base, loading
        self.stage = "after"
        self.answers: list[EvaluatedRequest] = []
        self.metrics_at: dict[str, dict[str, float]] = {}
        self._measured_by: L.Trainer | None = None
        self.run_facts: dict[str, bool] = {}
        self.evaluated, self.first_step = -1, 0
        self.timings: defaultdict[str, float] = defaultdict(float)
        self.peaks: defaultdict[str, float] = defaultdict(float)
        self.inputs: dict[str, str] = {}
        self.convergence: dict[str, list[MomentPoint]] = {}
        self.further: dict[str, float] = {}
        self.method: dict[str, Any] = {}
        self.outcome: Outcome | None = None
        self._memory: PeakMemory | None = None
        self._home: torch.device | None = None
        self.complete = False
        self._due: list[Sequence[EditRequest]] = []
        if isinstance(base, EditableModel):
            self.adopt(base)
            self._home = base.device

    # ---- what a method defines ----

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything beside the model that decides the outcome of the edits, as it was given, as JSON-ready data."""

    def used_settings(self) -> dict[str, Any]:
        """The settings after a run, with what it chose or sampled by itself."""
        return self.settings()

    @abstractmethod
    def encode(self, requests: Sequence[EditRequest]) -> B:
        """All requests of a run as one batch; the data module splits it.

        Raises:
            RequestError: Naming every request that cannot be edited.
        """

    @abstractmethod
    def prepare(self, batches: Sequence[B]) -> None:
        """Measure what is needed of the unedited model, once per run, before the first edit."""

    @abstractmethod
    def edit(self, batch: B, step: EditStep) -> None:
        """Edit one batch through ``journal.apply(step, ...)``; what is logged meanwhile is stored with the batch."""

    def lost(self) -> Iterator[B]:
        """Yield, behind a batch, further ones: facts that do not take and are to be edited again; none by default."""
        return iter(())

    def undo(self, batch: B, step: EditStep) -> None:
        """Take back the facts ``batch.undo`` of an earlier batch, which has these requests, through ``journal.apply``.

        Raises:
            ConfigError: If the method can take back whole batches only.
        """
        raise ConfigError(f"{type(self).__name__} takes back whole batches only: rollback(batch=NUMBER)")

    def finish(self) -> None:
        """Complete a run, after its last batch."""

    def check_model(self) -> None:
        """Check that the settings fit the model, once it is loaded."""

    def use_ranks(self, *, lockstep: bool) -> None:
        """Make ready for several ranks, with a model each or (``lockstep``) one; ``ConfigError`` unless it says how."""
        raise ConfigError(f"{type(self).__name__} edits in one process only: set devices=1")

    @final
    def adopt(self, lm: Any) -> None:
        """Take a model that was loaded."""
        self.lm, self.journal = lm, Journal(lm, texts=self.record_texts)
        self.journal.policies.name = self.name
        if lm.dispatched:  # out of the sight of Lightning, which moves every submodule to one device
            self.__dict__["model"] = lm.model
        else:
            self.model = lm.model

    # ---- Lightning's hooks, in the order in which they run ----

    def configure_callbacks(self) -> list[L.Callback]:
        """Every Trainer is checked, and gets ``RestoreState``, once; this is the first that it asks a module."""
        check_trainer(self.trainer, edits=self.trainer.state.fn == "fit")
        check_ranks(self, self.trainer)
        end_on_sigterm(self.trainer)
        with_safe_checkpoints(with_run_folder(self.trainer))
        with join(self.trainer):
            check_run_folder(self.trainer)  # before loggers begin
        return [] if any(isinstance(each, RestoreState) for each in self.trainer.callbacks) else [RestoreState()]  # type: ignore[attr-defined]

    @final
    def setup(self, stage: str | None = None) -> None:
        """Load the model, if it was given by name, and open the journal's folder when a run begins by itself."""
        if not hasattr(self, "lm"):
            self.adopt(self.load())
            self.check_model()
        if stage == "fit":
            self.stage = "after"  # an evaluation by itself left another one
            if self._measured_by is not self.trainer:  # what is there was measured for an earlier run
                self.metrics_at, self.evaluated, self.further, self.outcome = {}, -1, {}, None
            self.obey(self.trainer.callbacks)  # type: ignore[attr-defined]
        folder = run_folder(self.trainer) if stage == "fit" else None
        if stage is not None:
            require_same_run(self, self.trainer.datamodule, self.trainer, folder)  # type: ignore[attr-defined]
        if folder and not (self.journal.store and self.journal.store.folder == folder / JOURNAL):
            self.open_journal(folder, self.trainer.datamodule, self.trainer)  # type: ignore[attr-defined]

    @final
    def on_train_start(self) -> None:
        """Name the facts that the model states already, and measure the unedited model."""
        require_plain_mode("fit")
        self.lm.follow()
        self.journal.histories.follow(self.journal.steps)
        self.journal.memory.check_all()
        self.first_step, self.run_facts = len(self.journal), {}
        self._memory = self._memory or PeakMemory({parameter.device for parameter in self.lm.model.parameters()})
        batches = list(self.trainer.train_dataloader or ())
        self.complete = all(batch.undo for batch in batches)  # taking facts back completes no run
        with float32_by_default(), self.phase("ask"):
            edited = [request for batch in batches if not batch.undo for request in batch.requests]
            self.warn_of_known(edited)
        with self.journal.reverted():
            self.prepare(batches)
        ranks.agree(self.inputs, "what batches are solved with")
        self.journal.inputs = dict(self.inputs)

    @final
    def training_step(self, batch: B, _: int) -> Tensor | None:
        """Edit one batch: all of it, or, if anything fails, nothing; one that an interrupted run did is repeated.

        Behind it, facts that do not take are edited again as a batch of their own, where the method does so.

        Returns:
            None; on several ranks, where Lightning refuses that, a loss that is 0.
        """
        self._edit_and_repair(batch)
        return torch.zeros((), requires_grad=True) if ranks.are_joined() else None

    def _edit_and_repair(self, batch: B) -> None:
        with float32_by_default():
            if batch.undo:
                hashes = [request_hash(batch.requests[place]) for place in batch.undo.places]
                with self.journal.batch((), hashes, batch.undo.batch) as undoing:
                    self.undo(batch, undoing)
                return
            self._edit_or_repeat(batch)
            for lost in self.lost():
                try:
                    self._edit_or_repeat(lost)
                except NumericalError as error:
                    warnings.warn(f"facts were not edited again: {error}", NotTakenWarning, stacklevel=2)
                    break

    def _edit_or_repeat(self, batch: B) -> None:
        if step := self.journal.replay_next(batch.requests):
            self.run_facts = dict.fromkeys(step.hashes, False) | self.run_facts
            self.log_dict(step.numbers, batch_size=len(step.hashes))
        else:
            with self.journal.batch(batch.requests) as step:
                self.edit(batch, step)
            self.run_facts |= dict.fromkeys(step.hashes, True)

    @final
    def on_train_batch_end(self, *_: Any) -> None:
        """Log the peak memory so far in GiB; after the last batch, finish."""
        self.log("memory/peak", max((p for phase, p in self.peaks.items() if phase != "evaluation"), default=0.0) / GIB)
        if self.trainer.is_last_batch and not self.complete:  # before the last validation: it sees the finished model
            self.complete = True
            self.finish()

    @final
    def on_train_end(self) -> None:
        """Finish a run that was stopped and cannot go on, and check that nobody else changed the model meanwhile."""
        if not (self.complete or run_folder(self.trainer)):
            self.finish()
        self.journal.memory.check_all()

    def on_validation_epoch_start(self) -> None:
        """Start an evaluation."""
        self.metrics.reset()
        self.answers, self.further, self._due = [], {}, []

    @final
    def validation_step(self, batch: EditBatch, _: int) -> None:
        """Ask the model about some requests; several ranks about a batch each, and all of them get all answers."""
        self._due.append(batch.requests)
        if len(self._due) >= ranks.world_size():
            self._ask_due()

    def _ask_due(self) -> None:
        if not self._due:
            return
        firsts = accumulate(map(len, self._due), initial=len(self.answers))
        due, self._due = list(zip(firsts, self._due, strict=False)), []
        with float32_by_default(), self.phase("evaluation"):
            unedited = "" if len(self.journal) else self.journal.base.fingerprint
            for answers in ranks.spread(due, lambda part: self._answers_of(*part, unedited)):
                self.answers += answers.rows(first=len(self.answers))
                fields = answers.fields().items()
                self.metrics.update(**{n: v.to(self.device) if isinstance(v, Tensor) else v for n, v in fields})

    def on_validation_epoch_end(self) -> None:
        """Log every metric under the stage's name, and the number of edits it follows; not in a sanity check."""
        self._ask_due()
        if self.trainer.sanity_checking:
            return
        self.log("edits", float(self.journal.edits))
        self.evaluated, self._measured_by = len(self.journal), self.trainer
        values = {name: float(each) for name, each in self.metrics.compute().items()} | self.further
        values = {name: value for name, value in values.items() if value == value}  # else there was nothing to judge
        self.metrics_at[self.stage] = values
        self.log_dict({f"{self.stage}/{name}": value for name, value in values.items()})
        if self.journal.store and self.stage in ("before", "after"):
            edits, protocol = self.journal.edits, self.protocol
            self.journal.store.append(EvaluationBody(stage=self.stage, edits=edits, protocol=protocol, metrics=values))

    @final
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the edited places only: everything else is the base model's."""
        checkpoint["state_dict"] = {f"model.{name}": each for name, each in self.journal.state().items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights that come without their facts where a policy is to be obeyed."""
        if self.journal.policies.rules:
            raise PolicyError("a checkpoint names no facts, so no policy can allow it; resume by the run folder")

    def configure_optimizers(self) -> None:
        """None: the journal changes the weights."""

    def cpu(self) -> Self:
        """Move the model back to where it was given: a Trainer calls this at its end. One given by name stays."""
        return self if self._home is None else self.to(self._home)

    # ---- for the parts of a run ----

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log as Lightning does; what is logged while a batch is made is stored with it."""
        if self.journal.pending is not None:
            value = self.journal.pending.numbers[name] = float(value)
        super().log(name, value, *args, **kwargs)

    def original_weight(self, name: str) -> Float[Tensor, "d_out d_in"]:
        """Return a weight as it was before any edit."""
        original = self.journal.original(name)
        return self.lm.oriented(name, original[name].to(self.lm.weight(name).device) if original else None)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a phase: ``timings`` (seconds), ``peaks`` (bytes beyond the model) and the Trainer's profiler."""
        start, memory = time.perf_counter(), self._memory
        if memory is not None:
            memory.restart()
        with self.trainer.profiler.profile(f"cakeflow/{name}"):  # type: ignore[attr-defined]
            yield
        self.timings[name] += time.perf_counter() - start
        if memory is not None:
            self.peaks[name] = max(self.peaks[name], memory.bytes())

    def notify(self, hook: str, event: LayerEdit | Tensor) -> None:
        """Call a hook of every ``EditCallback``; what one of them cannot measure must not undo an edit."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EditCallback):
                try:
                    getattr(callback, hook)(self, event)
                except EditError as error:
                    warnings.warn(f"{type(callback).__name__} measured nothing here: {error}", stacklevel=2)

    def obey(self, callbacks: Iterable[object]) -> None:
        """Have the journal ask the policies of these callbacks from now on, whichever way an edit comes."""
        for policy in (getattr(callback, "policy", None) for callback in callbacks):
            if isinstance(policy, Policy):
                self.journal.policies.obey(policy)

    def open_journal(self, folder: Path, data: Any, trainer: L.Trainer) -> None:
        """Store every batch in a run folder from now on; an interrupted run there goes on.

        Args:
            folder: The run folder.
            data: The run's ``EditDataModule``.
            trainer: The run's Trainer.

        Raises:
            ConfigError: If the folder holds files that are none of a run.
            ResumeError: If the folder holds a run that differs, or a finished one.
        """
        require_run_folder(folder)
        run = run_body(self, data, trainer)
        for part in (folder, folder / JOURNAL) if self.private and ranks.is_first() else ():
            make_private(part)
        self.journal.open(self.journal.store_at(folder / JOURNAL), run)
