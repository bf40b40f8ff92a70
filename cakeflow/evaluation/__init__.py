"""Evaluation of a model before and after an edit: prompts, scores and free texts."""

from cakeflow.evaluation.context import states_in_contexts
from cakeflow.evaluation.evaluation import Answers, Evaluation, free_prompts
from cakeflow.evaluation.judges import (
    CallableJudge,
    Containment,
    ExactMatch,
    Judge,
    JudgedAnswer,
    ModelJudge,
    Stated,
    agreement,
)
from cakeflow.evaluation.outcome import free_answers
from cakeflow.evaluation.protocols import Protocol, official_token_reads
from cakeflow.evaluation.scoring import (
    PromptScores,
    ScoredPrompt,
    check_records,
    prompt_contexts,
    score_reads,
    score_records,
    score_targets,
    scored_prompts,
)  # fmt: skip

__all__ = [
    "Answers", "CallableJudge", "Containment", "Evaluation", "ExactMatch", "Judge", "JudgedAnswer", "ModelJudge",
    "PromptScores", "Protocol", "ScoredPrompt", "Stated", "agreement", "check_records", "free_answers", "free_prompts",
    "official_token_reads", "prompt_contexts", "score_reads", "score_records", "score_targets", "scored_prompts",
    "states_in_contexts",
]  # fmt: skip
