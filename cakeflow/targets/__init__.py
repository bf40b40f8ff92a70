"""Target search: the value each fact should have."""

from cakeflow.targets.gradient import TargetOptimizer, Targets

__all__ = ["TargetOptimizer", "Targets"]
