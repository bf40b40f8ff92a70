"""General ability before, during and after a run of edits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from cakeflow.callbacks import PeriodicCallback
from cakeflow.core import LocateThenEdit
from cakeflow_ability.tasks import TASKS, load_tasks, score_tasks

log = logging.getLogger(__name__)


class GeneralAbility(PeriodicCallback):
    """General ability before, during and after a run (AlphaEdit and CAKE, figure 3).

    Logs ``ability/{task}/{metric}`` and ``ability/{task}/{metric}_stderr`` (see ``general_ability``);
    ``report.plot_curves(report.curves_of(callback.rows)["ability f1"])`` is the figure.

    Args:
        data: Folder of the local tasks; see ``general_ability``.
        tasks: Names of the tasks.
        every: Batches between evaluations.
        limit: Items of each task, from its start; None takes all.
        trust_task_code: Whether task files may be used, whose Python and templates lm-eval runs. No config can have
            this, only Python and the command line (``--trust_task_code``).

    Raises:
        ConfigError: For the reasons of ``general_ability``; all files are read before a model is loaded or edited.
    """

    name = "ability"
    in_evaluations = True

    def __init__(
        self,
        data: str | Path | None = None,
        tasks: Sequence[str] = TASKS,
        every: int = 5,
        limit: int | None = 100,
        trust_task_code: bool = False,
    ) -> None:
        super().__init__(every)
        self.limit, self._tasks = limit, load_tasks(data, tasks, limit, trust_task_code=trust_task_code)

    def measure(self, module: LocateThenEdit) -> dict[str, float]:
        """Score the model on the tasks and log their accuracies."""
        numbers = score_tasks(module.lm, self._tasks, self.limit, module.max_bytes)
        accuracies = [
            f"{name.removesuffix('/acc')} {value:.3f}" for name, value in numbers.items() if name.endswith("/acc")
        ]
        log.info("accuracy: %s", ", ".join(accuracies))
        return numbers
