"""Editing vision transformers: harmful attention heads, their targets, and changes of the classifier."""

from cakeflow_vision.evaluation import ImageEvaluation
from cakeflow_vision.heads import first_order_scores, replacements, score_heads, top_heads, without_heads
from cakeflow_vision.method import ClassifierEdit, unrelated_pictures
from cakeflow_vision.metrics import EditSuccess, GroupGeneralization, LabelLocality, MirrorAccuracy, WorstGroup
from cakeflow_vision.solvers import RelativeRidge
from cakeflow_vision.targets import GradientTargets, HeadTargets, RepresentationSource

__all__ = [
    "ClassifierEdit", "EditSuccess", "GradientTargets", "GroupGeneralization", "HeadTargets", "ImageEvaluation",
    "LabelLocality", "MirrorAccuracy", "RelativeRidge", "RepresentationSource", "WorstGroup", "first_order_scores",
    "replacements", "score_heads", "top_heads", "unrelated_pictures", "without_heads",
]  # fmt: skip
