"""Target search: the value that a module should give for each fact."""

from cakeflow.targets.base import Targets, TargetSearch
from cakeflow.targets.gradient import GradientSearch
from cakeflow.targets.objective import (
    EssenceKL,
    NormDecay,
    Objective,
    ObjectiveTerm,
    ObjectiveValue,
    PreparedTerm,
    SearchProblem,
    TargetLikelihood,
    TermRows,
)  # fmt: skip
from cakeflow.targets.stop import LossBelow, SolvedAndNear, StopRule

__all__ = [
    "EssenceKL", "GradientSearch", "LossBelow", "NormDecay", "Objective", "ObjectiveTerm", "ObjectiveValue",
    "PreparedTerm", "SearchProblem", "SolvedAndNear", "StopRule", "TargetLikelihood", "TargetSearch", "Targets",
    "TermRows",
]  # fmt: skip
