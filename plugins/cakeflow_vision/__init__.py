"""Editing vision transformers: harmful attention heads, their targets, and changes of the classifier."""

from cakeflow_vision.base import ImageEdit, unrelated_pictures
from cakeflow_vision.direct import direct_scores, without_direct_effects
from cakeflow_vision.evaluation import ImageEvaluation, probabilities
from cakeflow_vision.heads import (
    first_order_scores,
    replacements,
    representations,
    score_heads,
    top_heads,
    without_heads,
)
from cakeflow_vision.method import ClassifierEdit
from cakeflow_vision.metrics import EditSuccess, GroupGeneralization, LabelLocality, MirrorAccuracy, WorstGroup
from cakeflow_vision.projections import ProjectionEdit, ValueSearch
from cakeflow_vision.recall import Recall
from cakeflow_vision.removal import HeadRemoval
from cakeflow_vision.solvers import RelativeRidge
from cakeflow_vision.targets import (
    GradientTargets,
    HeadTargets,
    RepresentationSource,
    RepresentationTargets,
    TargetProblem,
)

__all__ = [
    "ClassifierEdit", "EditSuccess", "GradientTargets", "GroupGeneralization", "HeadRemoval", "HeadTargets",
    "ImageEdit", "ImageEvaluation", "LabelLocality", "MirrorAccuracy", "ProjectionEdit", "Recall", "RelativeRidge",
    "RepresentationSource", "RepresentationTargets", "TargetProblem", "ValueSearch", "WorstGroup", "direct_scores",
    "first_order_scores", "probabilities", "replacements", "representations", "score_heads", "top_heads",
    "unrelated_pictures", "without_direct_effects", "without_heads",
]  # fmt: skip
