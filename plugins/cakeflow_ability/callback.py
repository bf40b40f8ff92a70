"""What editing costs elsewhere: general ability before, during and after a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cakeflow.callbacks.periodic import PeriodicCallback
from cakeflow_ability.tasks import TASKS, load_tasks, score_tasks

log = logging.getLogger(__name__)


class GeneralAbility(PeriodicCallback):
    """General ability before, during and after a run (AlphaEdit and CAKE, figure 3).

    Logs ``ability/{task}/{metric}`` and ``ability/{task}/{metric}_stderr`` (see ``general_ability``);
    ``report.plot_curves(report.curves_of(callback.rows)["ability f1"])`` is the figure.

    Args:
        data: Folder of the local tasks; see ``general_ability``.
        tasks: Which tasks.
        every: Batches between evaluations.
        limit: Items of each task, from its start; None takes all.

    Raises:
        ConfigError: As ``general_ability``; files are read and checked here, before a model is loaded or edited.
    """

    name = "ability"

    def __init__(
        self,
        data: str | Path | None = None,
        tasks: Sequence[str] = TASKS,
        every: int = 5,
        limit: int | None = 100,
    ) -> None:
        super().__init__(every)
        self.limit, self._tasks = limit, load_tasks(data, tasks, limit)

    def measure(self, module: Any) -> dict[str, float]:
        """See ``PeriodicCallback``."""
        numbers = score_tasks(module.lm, self._tasks, self.limit)
        shown = [f"{name.removesuffix('/acc')} {value:.3f}" for name, value in numbers.items() if name.endswith("/acc")]
        log.info("accuracy: %s", ", ".join(shown))
        return numbers
