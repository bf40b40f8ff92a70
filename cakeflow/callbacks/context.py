"""Edited facts asked behind other text, before and after a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L

from cakeflow.callbacks.periodic import PeriodicCallback
from cakeflow.data.request import EditRequest
from cakeflow.errors import require_count
from cakeflow.evaluation.context import LENGTHS, contexts, states_in_contexts


class ContextCheck(PeriodicCallback):
    """Asks the facts of a run behind a system prompt, earlier turns, and 50 to 200 other tokens.

    Logs ``context/alone``, ``context/text_50`` and ``context/text_200``, the shares of facts that the model states
    there, and where the tokenizer has a chat template ``context/chat``, ``context/chat_50``, ``context/chat_200``,
    ``context/turns`` and ``context/system``.

    Args:
        limit: Most facts, from the first; None takes all.
        lengths: Numbers of other tokens.
        text: The other text; by default some 900 tokens about everyday matters.
        every: Number of batches between measurements; None measures at both ends of a run only.

    Raises:
        ConfigError: If a number is out of range.
    """

    name = "context"
    in_evaluations = True

    def __init__(
        self,
        limit: int | None = 100,
        lengths: Sequence[int] = LENGTHS,
        text: str | None = None,
        every: int | None = None,
    ) -> None:
        super().__init__(every)
        require_count("limit", limit, 1, optional=True)
        for length in lengths:
            require_count("lengths", length, 1)
        self.limit, self.lengths, self.text = limit, tuple(lengths), text
        self._facts: Sequence[EditRequest] = ()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that the text is long enough, before the expensive work."""
        contexts(pl_module.lm, self.lengths, self.text)  # type: ignore[arg-type]

    def begin(self, module: Any, requests: Sequence[EditRequest]) -> None:
        """Take the facts."""
        self._facts = requests[: self.limit]

    def measure(self, module: Any) -> dict[str, float]:
        """Return the share of facts that the model states in each context."""
        if not self._facts:
            return {}
        return states_in_contexts(module.lm, self._facts, self.lengths, self.text, module.max_bytes)
