"""General ability of a model: language tasks scored by lm-evaluation-harness."""

from cakeflow_ability.callback import GeneralAbility
from cakeflow_ability.tasks import TASKS, general_ability, load_tasks, score_tasks

__all__ = ["TASKS", "GeneralAbility", "general_ability", "load_tasks", "score_tasks"]
