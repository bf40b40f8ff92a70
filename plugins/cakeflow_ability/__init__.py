"""General ability of a model: language tasks scored by lm-evaluation-harness, and multiple choice from local files."""

from cakeflow_ability.callback import GeneralAbility
from cakeflow_ability.choices import ChoiceAbility, ChoiceItem, ChoiceScore, read_choices, score_choices
from cakeflow_ability.tasks import TASKS, general_ability, load_tasks, score_tasks

__all__ = [
    "TASKS", "ChoiceAbility", "ChoiceItem", "ChoiceScore", "GeneralAbility", "general_ability", "load_tasks",
    "read_choices", "score_choices", "score_tasks",
]  # fmt: skip
