"""Metrics: torchmetrics classes fed with log-probabilities and texts, never with a model."""

from cakeflow.metrics.preference import Efficacy, Generalization, Specificity
from cakeflow.metrics.score import EditScore
from cakeflow.metrics.text import Consistency, Fluency

__all__ = ["Consistency", "EditScore", "Efficacy", "Fluency", "Generalization", "Specificity"]
