"""Metrics of routes: do questions about edits reach the memory, and all others the model itself."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc

from cakeflow.errors import ConfigError
from cakeflow.metrics import Mean
from cakeflow.storage import write_text
from cakeflow_sidememory.routes import Route


class RoutingAccuracy(Mean):
    """Share of questions that go where they should: edits and paraphrases to the memory, all others to the model."""

    def update(self, in_scope: Bool[Tensor, " n"], decision: Int[Tensor, " n"]) -> None:
        """Add questions.

        Args:
            in_scope: True for edits and paraphrases.
            decision: Number of the answer, 0 for the model itself.
        """
        self.add((decision > 0) == in_scope)


class RoutingAUC(Metric):
    """Area under the ROC curve of edits and paraphrases against all others, by distance: .5 is chance, 1 no overlap.

    It says what any threshold could reach, and does not depend on the one that there is.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    scores: list[Tensor]
    labels: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("scores", "labels"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, in_scope: Bool[Tensor, " n"], score: Float[Tensor, " n"]) -> None:
        """Add questions.

        Args:
            in_scope: True for edits and paraphrases.
            score: Distance, with the sign by which larger ones are nearer to the memory (``Route.score``).
        """
        self.scores.append(score.double())
        self.labels.append(in_scope.long())

    def compute(self) -> Tensor:
        """Return the area; nan without questions of both sorts."""
        scores, labels = (torch.cat([*parts]) if len(parts) else torch.empty(0) for parts in (self.scores, self.labels))
        if not 0 < int(labels.sum()) < len(labels):
            return torch.tensor(torch.nan)
        ranks = scores.unique(return_inverse=True)[1] / len(scores)  # torchmetrics squeezes what is outside of [0, 1]
        return binary_auroc(ranks, labels.long())


class OwnAnswers(Mean):
    """Share of edited prompts that get the answer that learned them: their own shard, entry or fact."""

    def update(self, decision: Int[Tensor, " n"], own: Int[Tensor, " n"]) -> None:
        """Add edited prompts.

        Args:
            decision: Number of the answer.
            own: Number of their own.
        """
        self.add((decision == own) & (own > 0))


def routing_numbers(rows: Sequence[Route]) -> dict[str, float]:
    """Return the metrics of some routes, by name; what cannot be computed is left out.

    Args:
        rows: Routes; those of facts that are not in force say nothing and do not count.
    """
    counted = [row for row in rows if row.own is not None]
    edits = [row for row in counted if row.kind == "rewrite"]
    in_scope = torch.tensor([row.in_scope for row in counted], dtype=torch.bool)
    decision = torch.tensor([row.decision for row in counted], dtype=torch.long)
    accuracy, area, own = RoutingAccuracy(), RoutingAUC(), OwnAnswers()
    if counted:
        accuracy.update(in_scope, decision)
        area.update(in_scope, torch.tensor([row.score for row in counted], dtype=torch.float64))
    if edits:
        own.update(torch.tensor([row.decision for row in edits]), torch.tensor([row.own for row in edits]))
    metrics = {"accuracy": accuracy, "auc": area, "own": own}
    values = {name: float(metric.compute()) for name, metric in metrics.items() if metric.update_called}
    return {name: value for name, value in values.items() if not math.isnan(value)}


class RouteCheck(L.Callback):
    """Logs the metrics of routes with every evaluation behind an edit, and writes the routes into the run folder.

    The metrics are ``routing/accuracy``, ``routing/auc`` and ``routing/own``; ``routes.jsonl`` has a line per question:
    record, kind, prompt, place, distance, threshold, side, decision and own (``Route``); an infinite number is null.

    Attributes:
        rows: The routes of the last evaluation.
    """

    def __init__(self) -> None:
        self.rows: list[Route] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that the method routes.

        Raises:
            ConfigError: If it does not.
        """
        if not callable(getattr(pl_module, "routes", None)):
            raise ConfigError(f"RouteCheck: {type(pl_module).__name__} routes nothing; leave this callback out")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Route all questions of an evaluation, once there are edits."""
        if trainer.sanity_checking or not pl_module.journal.edits:
            return
        with pl_module.phase("evaluation"):
            requests = [request for batch in trainer.val_dataloaders for request in batch.requests]  # type: ignore[union-attr]
            self.rows = pl_module.routes(requests)
        pl_module.further |= {f"routing/{name}": value for name, value in routing_numbers(self.rows).items()}
        if (store := pl_module.journal.store) is not None and pl_module.stage == "after":
            write_text(store.folder.parent / "routes.jsonl", "".join(f"{_line(row)}\n" for row in self.rows))


def _line(row: Route) -> str:
    values = {name: None if isinstance(v, float) and math.isinf(v) else v for name, v in row._asdict().items()}
    return json.dumps(values, ensure_ascii=False)
