"""What an edit module asks of a language model; a method for another kind of model overrides these four."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchmetrics import MetricCollection

from cakeflow.data.request import EditRequest
from cakeflow.data.review import check_fields
from cakeflow.evaluation.evaluation import Evaluation, warn_of_known
from cakeflow.evaluation.scoring import check_records
from cakeflow.journal.schema import EvaluatedRequest
from cakeflow.models.language import LanguageModel
from cakeflow.models.loading import load_model


class Questions:
    """The part of ``EditModule`` that depends on the kind of the model: how it is loaded, asked and checked.

    Attributes:
        lm: The model.
        evaluation: What the model is asked.
        metrics: Metrics of every evaluation.
        answers: The answers of every request in the last evaluation.
        max_bytes: Most bytes beyond the model that edits and evaluations may take; None for no limit.
    """

    lm: LanguageModel
    evaluation: Evaluation
    metrics: MetricCollection
    answers: list[EvaluatedRequest]
    max_bytes: float | None = None
    _base: Any
    _loading: dict[str, Any]
    _requested: set[str]

    def load(self) -> Any:
        """Load the model that was named."""
        return load_model(str(self._base), **self._loading)

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Check that the metrics can judge these requests, and that the model can read them.

        Raises:
            ConfigError: If a metric that the user named can judge none of them, or a chat cannot be written.
            RequestError: If a text is too long, or a target has no token.
        """
        needs = {name: getattr(metric, "needs", ()) for name, metric in self.metrics.items()}
        check_fields(requests, needs, self._requested)
        check_records(self.lm, requests)
        self.evaluation.check(self.lm)

    def ask(self, requests: Sequence[EditRequest]) -> Any:
        """Ask the model about the next requests of an evaluation; returns their ``evaluation.Answers``."""
        return self.evaluation.ask(self.lm, requests, len(self.answers), self.max_bytes)

    def warn_of_known(self, requests: Sequence[EditRequest]) -> None:
        """Warn of requests whose target the model gives already."""
        warn_of_known(self.lm, requests, self.max_bytes)
