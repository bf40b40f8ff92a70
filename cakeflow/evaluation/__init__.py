"""Questions to a model before and after an edit, and the scores of its answers."""

from cakeflow.evaluation.evaluation import Answers, Evaluation
from cakeflow.evaluation.protocols import Protocol
from cakeflow.evaluation.scoring import KINDS, PromptScores, check_records, score_reads, score_records, score_targets

__all__ = [
    "KINDS",
    "Answers",
    "Evaluation",
    "PromptScores",
    "Protocol",
    "check_records",
    "score_reads",
    "score_records",
    "score_targets",
]
