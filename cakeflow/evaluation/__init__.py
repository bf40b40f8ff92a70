"""Evaluation of a model before and after an edit: prompts, scores and free texts."""

from cakeflow.evaluation.evaluation import Answers, Evaluation
from cakeflow.evaluation.protocols import Protocol
from cakeflow.evaluation.scoring import (
    PromptScores,
    ScoredPrompt,
    check_records,
    score_reads,
    score_records,
    score_targets,
    scored_prompts,
)

__all__ = [
    "Answers",
    "Evaluation",
    "PromptScores",
    "Protocol",
    "ScoredPrompt",
    "check_records",
    "score_reads",
    "score_records",
    "score_targets",
    "scored_prompts",
]
