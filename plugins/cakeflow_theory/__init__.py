"""Measurements of CAKE's theory during edits: drift, theorem 2, alignment of scores."""

from cakeflow_theory.alignment import ScoreAlignment, alignment, single_layer_mismatch
from cakeflow_theory.theory import ResidualDrift, ScoreDrift, WeightShiftBound, sensitivity

__all__ = [
    "ResidualDrift", "ScoreAlignment", "ScoreDrift", "WeightShiftBound", "alignment", "sensitivity",
    "single_layer_mismatch",
]  # fmt: skip
