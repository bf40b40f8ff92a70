"""Target search: the value each fact should have."""

from cakeflow.targets.gradient import GradientSearch, Targets

__all__ = ["GradientSearch", "Targets"]
