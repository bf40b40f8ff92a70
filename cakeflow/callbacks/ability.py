"""What editing costs elsewhere: general ability before, during and after a run."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch

from cakeflow.ability import TASKS, load_tasks, score_tasks
from cakeflow.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

log = logging.getLogger(__name__)


class GeneralAbility(L.Callback):
    """General ability before, during and after a run (AlphaEdit and CAKE, figure 3).

    Evaluates the unedited model, the model after every ``every`` batches, and the final one, which a solver may have
    changed once more when the run ended. Logs ``ability/{task}/{metric}`` and ``ability/{task}/{metric}_stderr`` (see
    ``general_ability``) with ``ability/edits``, the number of facts edited so far; the step is the number of batches.
    The same rows are kept in ``rows``, for ``plot_ability``.

    Args:
        data: Folder of the local tasks; see ``general_ability``.
        tasks: Which tasks.
        every: Batches between evaluations.
        limit: Items of each task, from its start; None takes all.

    Raises:
        ConfigError: As ``general_ability``; files are read and checked here, before a model is loaded or edited.
    """

    def __init__(
        self,
        data: str | Path | None = None,
        tasks: Sequence[str] = TASKS,
        every: int = 5,
        limit: int | None = 100,
    ) -> None:
        if every < 1:
            raise ConfigError(f"every must be at least 1 batch, got {every}")
        self.every, self.limit = every, limit
        self.rows: list[dict[str, float]] = []
        self._tasks = load_tasks(data, tasks, limit)
        self._seen = -1

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Measure the model as it is, once every request was checked."""
        if batch_idx == 0:
            self._measure(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Measure every few batches."""
        if (batch_idx + 1) % self.every == 0:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure what came after the last time."""
        self._measure_changed(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure what a solver did when the run ended (on the CPU: Lightning has put the model there by now)."""
        self._measure_changed(trainer, pl_module)

    def _measure_changed(self, trainer: L.Trainer, module: Any) -> None:
        if len(module.journal) != self._seen:
            self._measure(trainer, module)

    def _measure(self, trainer: L.Trainer, module: Any) -> None:
        with module.phase("evaluation"):
            numbers = score_tasks(module.lm, self._tasks, self.limit)
        self._seen, edits = len(module.journal), sum(len(step.requests) for step in module.journal)
        shown = [f"{name.removesuffix('/acc')} {value:.3f}" for name, value in numbers.items() if name.endswith("/acc")]
        log.info("accuracy after %d edits: %s", edits, ", ".join(shown))
        row = {"ability/edits": float(edits), **{f"ability/{name}": value for name, value in numbers.items()}}
        self.rows.append(row)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in row.items()})
        for logger in trainer.loggers:  # not module.log, which would date the first row as the batch that follows it
            logger.log_metrics(row, step=trainer.global_step)
            logger.save()


def plot_ability(rows: Sequence[Mapping[str, float]], ax: Axes | None = None, metric: str = "f1") -> Axes:
    """A metric of each task over the number of edits, with 95 % intervals (CAKE, figure 3).

    Args:
        rows: What ``GeneralAbility`` logged, e.g. its ``rows``.
        ax: Where to draw; a new figure by default.
        metric: Which metric.

    Raises:
        ConfigError: If no task has this metric.
    """
    names = [name for name in dict.fromkeys(chain.from_iterable(rows)) if name.endswith(f"/{metric}")]
    if not names:
        raise ConfigError(f"nothing was logged as 'ability/{{task}}/{metric}'; add the callback GeneralAbility")
    import matplotlib.pyplot as plt  # slow, and every run imports the callbacks

    ax = ax or plt.figure(figsize=(5, 3), layout="tight").gca()
    for name in names:
        edits, values = [row["ability/edits"] for row in rows], [row[name] for row in rows]
        errors = [1.96 * row.get(f"{name}_stderr", math.nan) for row in rows]
        ax.errorbar(edits, values, errors, fmt="o-", capsize=2, label=name.split("/")[1])
    ax.set(xlabel="edits", ylabel=metric)
    ax.legend(fontsize="small")
    return ax
