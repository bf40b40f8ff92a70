"""A module whose model is asked about records, and whose phases are timed."""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
from torch import Tensor
from torchmetrics import Metric

from cakeflow.core.callback import EditCallback, LayerEdit
from cakeflow.core.datamodule import Records
from cakeflow.core.memory import PeakMemory
from cakeflow.data import check_fields
from cakeflow.data.request import EditRequest
from cakeflow.errors import EditError
from cakeflow.evaluation.evaluation import Evaluation
from cakeflow.evaluation.scoring import check_records
from cakeflow.journal.journal import Journal
from cakeflow.journal.schema import EvaluatedRequest, EvaluationBody
from cakeflow.models.language import LanguageModel


class EditModule(L.LightningModule):
    """The evaluation of an ``LocateThenEdit``: Lightning's validation, phases, and those who watch.

    Attributes:
        lm: The model.
        journal: What was done to it.
        stage: Under which name metrics are logged: ``before`` or ``after`` an edit, ``now`` without one.
        outcomes: What every record answered in the last evaluation.
        measured: Stage -> metrics.
        evaluated: Batches that were done at the last evaluation.
        timings: Phase -> seconds.
        peaks: Phase -> most bytes beyond the model.

    Args:
        evaluation: What is asked of the model.
        metrics: Further metrics.
    """

    lm: LanguageModel
    journal: Journal

    def __init__(self, evaluation: Evaluation, metrics: Sequence[Metric]) -> None:
        super().__init__()
        self.evaluation, self.metrics = evaluation, evaluation.metrics(metrics)
        self._asked = {type(metric).__name__.lower() for metric in metrics} | (
            {"fluency"} if evaluation.texts_every else set()
        )
        self.stage = "after"
        self.outcomes: list[EvaluatedRequest] = []
        self.measured: dict[str, dict[str, float]] = {}
        self.evaluated = -1
        self.timings: defaultdict[str, float] = defaultdict(float)
        self.peaks: defaultdict[str, float] = defaultdict(float)
        self._memory: PeakMemory | None = None

    def on_validation_epoch_start(self) -> None:
        """Start counting from nothing."""
        self.metrics.reset()
        self.outcomes = []

    def validation_step(self, records: Records, _: int) -> None:
        """Ask about some records; what each one answered is kept in ``outcomes``."""
        with self.phase("evaluation"):
            answers = self.evaluation.ask(self.lm, records.requests, first=len(self.outcomes))
            self.outcomes += answers.rows(first=len(self.outcomes))
            fields = answers.fields().items()
            self.metrics.update(**{n: v.to(self.device) if isinstance(v, Tensor) else v for n, v in fields})

    def on_validation_epoch_end(self) -> None:
        """Log every metric under the stage's name (``before`` or ``after``), and how many edits it follows."""
        self.log("edits", float(self.journal.edits))
        self.evaluated = len(self.journal)
        self.measured[self.stage] = found = {name: float(value) for name, value in self.metrics.compute().items()}
        self.log_dict({f"{self.stage}/{name}": value for name, value in found.items()})
        if self.journal.record and self.stage in ("before", "after"):
            self.journal.record.append(
                EvaluationBody(stage=self.stage, edits=self.journal.edits, protocol=self.evaluation.id, metrics=found)
            )

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Lightning's; what is logged while a batch is made becomes part of its account."""
        if self.journal.pending is not None:
            value = self.journal.pending.numbers[name] = float(value)
        super().log(name, value, *args, **kwargs)

    def check_records(self, requests: Sequence[EditRequest]) -> None:
        """Whether the metrics can judge these records, and the model can read them.

        Raises:
            ConfigError: If a metric that was asked for can judge none of them.
            RequestError: If a text is too long, or a target has no token.
        """
        needs = {name: getattr(metric, "needs", ()) for name, metric in self.metrics.items()}
        check_fields(requests, needs, self._asked)
        self.setup("validate")
        check_records(self.lm, requests)

    def watch_memory(self) -> None:
        """Begin to count memory, from what is in use now."""
        self._memory = self._memory or PeakMemory({parameter.device for parameter in self.lm.model.parameters()})

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

    def notify(self, hook: str, news: LayerEdit | Tensor) -> None:
        """Call a hook of every watcher; what one cannot measure must not undo an edit."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EditCallback):
                try:
                    getattr(callback, hook)(self, news)
                except EditError as error:
                    warnings.warn(f"{type(callback).__name__} measured nothing here: {error}", stacklevel=2)
