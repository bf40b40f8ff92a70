"""Callbacks around edits, for any Lightning Trainer."""

from cakeflow.callbacks.ability import GeneralAbility
from cakeflow.callbacks.alignment import ScoreAlignment
from cakeflow.callbacks.base import EditCallback, LayerEdit, Milestones
from cakeflow.callbacks.policy import Policy, PolicyGuard
from cakeflow.callbacks.stream import NeutralText, Retention
from cakeflow.callbacks.theory import ResidualDrift, ScoreDrift, WeightShiftBound

__all__ = [
    "EditCallback",
    "GeneralAbility",
    "LayerEdit",
    "Milestones",
    "NeutralText",
    "Policy",
    "PolicyGuard",
    "ResidualDrift",
    "Retention",
    "ScoreAlignment",
    "ScoreDrift",
    "WeightShiftBound",
]
