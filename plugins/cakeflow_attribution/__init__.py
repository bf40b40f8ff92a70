"""Scores of layers beside causal traces: gradients, and controls that spoil given scores (CAKE, appendix F.2)."""

from cakeflow_attribution.controls import Noisy, Shuffled
from cakeflow_attribution.gradients import IntegratedGradients, Saliency

__all__ = ["IntegratedGradients", "Noisy", "Saliency", "Shuffled"]
