"""Callbacks around edits, for any Lightning Trainer."""

from cakeflow.callbacks.base import EditCallback, LayerEdit
from cakeflow.callbacks.theory import ResidualDrift, ScoreDrift, WeightShiftBound

__all__ = ["EditCallback", "LayerEdit", "ResidualDrift", "ScoreDrift", "WeightShiftBound"]
