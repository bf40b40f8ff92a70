"""Metrics: torchmetrics classes fed with log-probabilities and texts, never with a model."""

from cakeflow.metrics.consequences import AnyAnswerRate, ObjectShift
from cakeflow.metrics.distribution import TopOverlap, prediction_shift, top_overlap
from cakeflow.metrics.exposure import SubjectRecall, exposure
from cakeflow.metrics.preference import KINDS, Efficacy, Generalization, Specificity, record_means, success
from cakeflow.metrics.score import EditScore
from cakeflow.metrics.text import AnswerRate, Consistency, Fluency, fluency

__all__ = [
    "KINDS", "AnswerRate", "AnyAnswerRate", "Consistency", "EditScore", "Efficacy", "Fluency", "Generalization",
    "ObjectShift", "Specificity", "SubjectRecall", "TopOverlap", "exposure", "fluency", "prediction_shift",
    "record_means", "success", "top_overlap",
]  # fmt: skip
