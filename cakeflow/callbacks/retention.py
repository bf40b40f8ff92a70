"""Retention of earlier edits along a stream of edits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from cakeflow.callbacks.periodic import PeriodicCallback
from cakeflow.errors import ConfigError, require_choice
from cakeflow.evaluation.scoring import score_records
from cakeflow.journal.steps import facts_in_force
from cakeflow.metrics import retention
from cakeflow.metrics.preference import Form, success


class Retention(PeriodicCallback):
    """Measures the success of all edits so far: ``retention/mean``, and of the first batch, ``retention/first``.

    Args:
        every: Number of batches between measurements.
        form: Criterion of success (``cakeflow.metrics.preference``).

    Attributes:
        curves: Per measurement the success of each batch so far, oldest first.
    """

    name = "retention"

    def __init__(self, every: int = 1, form: Form = "exact") -> None:
        super().__init__(every)
        require_choice("form", form, Form)
        if form not in ("exact", "tokens", "probability"):
            raise ConfigError("Retention does not generate free answers; use form 'exact', 'tokens' or 'probability'")
        self.form = form
        self.curves: list[list[float]] = []

    def measure(self, module: Any) -> dict[str, float]:
        """Return the mean success over edits, and that of the first batch."""
        batches = {step.number: place for place, step in enumerate(module.journal)}
        facts = [(step, i) for step, i in facts_in_force(module.journal) if step.requests]
        edits = [(batches[step.number], step.requests[i]) for step, i in facts]
        if not edits:
            self.curves = []
            return {}
        records = [replace(request, probes=()) for _, request in edits]
        scores = score_records(module.lm, records, max_bytes=module.max_bytes)
        fields = {name: getattr(scores, name) for name in ("expected", "rival", "correct", "tokens", "answered")}
        hits, batch = success(self.form, **fields), torch.tensor([number for number, _ in edits])
        judged = ~hits.isnan()  # the form "probability" needs a true target
        if not judged.any():
            return {}
        metric = retention.Retention(sync_on_compute=False)
        metric.update(hits[judged], batch[judged])
        self.curves.append(metric.by_batch().tolist())
        first = self.curves[-1][0]  # nan where later batches replaced all of it
        return {"mean": float(metric.compute())} | ({"first": first} if first == first else {})
