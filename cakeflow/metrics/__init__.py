"""Metrics: torchmetrics classes fed with log-probabilities, never with a model."""

from cakeflow.metrics.preference import Efficacy, Generalization, Specificity
from cakeflow.metrics.score import EditScore

__all__ = ["EditScore", "Efficacy", "Generalization", "Specificity"]
