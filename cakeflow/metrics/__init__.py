"""Metrics: torchmetrics classes fed with log-probabilities and texts, never with a model."""

from cakeflow.metrics.preference import KINDS, Efficacy, Generalization, Specificity
from cakeflow.metrics.score import EditScore
from cakeflow.metrics.text import Consistency, Fluency

__all__ = ["KINDS", "Consistency", "EditScore", "Efficacy", "Fluency", "Generalization", "Specificity"]
