"""What editing costs elsewhere: general ability before, during and after a run."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cakeflow.ability import TASKS, load_tasks, score_tasks
from cakeflow.callbacks.base import Milestones
from cakeflow.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

log = logging.getLogger(__name__)


class GeneralAbility(Milestones):
    """General ability before, during and after a run (AlphaEdit and CAKE, figure 3).

    Logs ``ability/{task}/{metric}`` and ``ability/{task}/{metric}_stderr`` (see ``general_ability``); ``rows`` are what
    ``plot_ability`` draws.

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
        """See ``Milestones``."""
        numbers = score_tasks(module.lm, self._tasks, self.limit)
        shown = [f"{name.removesuffix('/acc')} {value:.3f}" for name, value in numbers.items() if name.endswith("/acc")]
        log.info("accuracy: %s", ", ".join(shown))
        return numbers


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
