"""Callbacks around edits, for any Lightning Trainer."""

from cakeflow.callbacks.ability import GeneralAbility, plot_ability
from cakeflow.callbacks.alignment import ScoreAlignment
from cakeflow.callbacks.base import EditCallback, LayerEdit
from cakeflow.callbacks.theory import ResidualDrift, ScoreDrift, WeightShiftBound

__all__ = [
    "EditCallback",
    "GeneralAbility",
    "LayerEdit",
    "ResidualDrift",
    "ScoreAlignment",
    "ScoreDrift",
    "WeightShiftBound",
    "plot_ability",
]
