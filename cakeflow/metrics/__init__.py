"""Metrics: torchmetrics classes fed with log-probabilities and texts, never with a model."""

from cakeflow.metrics.consequences import ObjectShift
from cakeflow.metrics.distribution import TopOverlap, prediction_shift, top_overlap
from cakeflow.metrics.exposure import SubjectRecall, exposure
from cakeflow.metrics.mean import Mean
from cakeflow.metrics.preference import KINDS, Efficacy, Generalization, Specificity, record_means, success
from cakeflow.metrics.score import EditScore
from cakeflow.metrics.text import AnswerRate, Consistency, Fluency, fluency

__all__ = [
    "KINDS", "AnswerRate", "Consistency", "EditScore", "Efficacy", "Fluency", "Generalization",
    "Mean", "ObjectShift", "Specificity", "SubjectRecall", "TopOverlap", "exposure", "fluency", "prediction_shift",
    "record_means", "success", "top_overlap",
]  # fmt: skip
