"""Evaluation of a model before and after an edit: prompts, scores and free texts."""

from cakeflow.evaluation.evaluation import Answers, Evaluation, free_prompts
from cakeflow.evaluation.protocols import Protocol, official_token_reads
from cakeflow.evaluation.scoring import (
    PromptScores,
    ScoredPrompt,
    check_records,
    score_reads,
    score_records,
    score_targets,
    scored_prompts,
)  # fmt: skip

__all__ = [
    "Answers", "Evaluation", "PromptScores", "Protocol", "ScoredPrompt", "check_records", "free_prompts",
    "official_token_reads", "score_reads", "score_records", "score_targets", "scored_prompts",
]  # fmt: skip
