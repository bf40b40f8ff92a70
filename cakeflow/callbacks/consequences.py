"""Free answers to questions that follow from the edited facts, or should stay as they are."""

from __future__ import annotations

from typing import Any

import lightning as L

from cakeflow.callbacks.periodic import PeriodicCallback
from cakeflow.data.public_files import Consequence
from cakeflow.data.sources import Source, read_consequences
from cakeflow.errors import require_count
from cakeflow.evaluation.outcome import free_answers
from cakeflow.evaluation.protocols import WILD_TOKENS
from cakeflow.metrics.text import AnswerRate


class ConsequenceCheck(PeriodicCallback):
    """Asks the questions of a file of KnowEdit or MQuAKE, as the ``wild`` protocol does.

    Logs ``consequences/{topic}``, the share of questions of which one wording is answered with a right name:
    ``aliases``, ``reasoning``, ``logic`` and ``multi_hop`` should rise with edits, ``relations`` and ``forgetfulness``
    stay.

    Args:
        source: The file whose facts are edited, unchanged.
        records: Most records, from the first; None takes all. Edit as many of them.
        chat: Whether to ask as the user's turn of a chat.
        every: Number of batches between measurements; None measures at both ends of a run only.

    Raises:
        ConfigError: If a number is out of range, or the file has no such question.
    """

    name = "consequences"
    in_evaluations = True

    def __init__(
        self, source: Source, records: int | None = None, chat: bool = False, every: int | None = None
    ) -> None:
        super().__init__(every)
        require_count("records", records, 1, optional=True)
        self.chat = chat
        questions = read_consequences(source)
        self.questions: list[Consequence] = [each for each in questions if records is None or each.case < records]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that the model can be asked in this way, before the expensive work."""
        if self.chat:
            pl_module.lm.user_turn("Hello")  # type: ignore[operator,union-attr]

    def measure(self, module: Any) -> dict[str, float]:
        """Return the share of questions of each topic that are answered rightly."""
        prompts = [prompt for each in self.questions for prompt in each.prompts]
        texts = iter(free_answers(module.lm, prompts, WILD_TOKENS, self.chat, module.max_bytes))
        metrics: dict[str, AnswerRate] = {}
        for each in self.questions:
            answers = [next(texts) for _ in each.prompts]
            metric = metrics.setdefault(each.topic, AnswerRate(sync_on_compute=False))
            metric.update([answers], [each.answers])
        return {topic: float(metric.compute()) for topic, metric in metrics.items()}
