"""Layer scores beside causal traces: gradients, and controls with worse scores (CAKE, appendix F.2)."""

from cakeflow_attribution.controls import Noisy, Shuffled
from cakeflow_attribution.gradients import IntegratedGradients, Saliency

__all__ = ["IntegratedGradients", "Noisy", "Saliency", "Shuffled"]
