"""What a stream of edits does to earlier edits, and to text that has nothing to do with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from cakeflow.callbacks.periodic import PeriodicCallback
from cakeflow.errors import ConfigError
from cakeflow.evaluation.scoring import score_records
from cakeflow.metrics import retention
from cakeflow.metrics.preference import Form, checked_form, success


class Retention(PeriodicCallback):
    """Accuracy on edits 1 to k, after n >= k: logs ``retention/mean`` and ``retention/first``, of the first batch.

    Args:
        every: Batches between measurements.
        form: What counts as success (``cakeflow.metrics.preference``).

    Attributes:
        curves: For every measurement the success of each batch so far, oldest first.
    """

    name = "retention"

    def __init__(self, every: int = 1, form: Form = "exact") -> None:
        super().__init__(every)
        if checked_form(form) == "answer":
            raise ConfigError("Retention asks for no free answers; use form 'exact', 'tokens' or 'probability'")
        self.form = form
        self.curves: list[list[float]] = []

    def measure(self, module: Any) -> dict[str, float]:
        """See ``PeriodicCallback``."""
        edits = [(number, request) for number, step in enumerate(module.journal) for request in step.requests]
        if not edits:
            self.curves = []
            return {}
        scores = score_records(module.lm, [replace(request, probes=()) for _, request in edits])
        fields = {name: getattr(scores, name) for name in ("expected", "rival", "correct", "tokens", "answered")}
        found, batch = success(self.form, **fields), torch.tensor([number for number, _ in edits])
        judged = ~found.isnan()  # probabilities need a true target
        if not judged.any():
            return {}
        metric = retention.Retention()
        metric.update(found[judged], batch[judged])
        self.curves.append(metric.by_batch().tolist())
        return {"mean": float(metric.compute()), "first": self.curves[-1][0]}
