"""Solvers: closed-form weight changes, and the numbers they work on. Wrappers compose."""

from cakeflow.solvers.base import Solver
from cakeflow.solvers.covariance import Covariance
from cakeflow.solvers.decoys import Decoys
from cakeflow.solvers.descent import Descent
from cakeflow.solvers.equality import EqualityConstrained
from cakeflow.solvers.exact_sum import ExactSum
from cakeflow.solvers.from_scratch import FromScratch
from cakeflow.solvers.history import GramFactor, KeyHistory
from cakeflow.solvers.least_squares import LeastSquares
from cakeflow.solvers.null_space import NullSpace
from cakeflow.solvers.planned import PlannedHistory
from cakeflow.solvers.problem import LayerProblem, Update

__all__ = [
    "Covariance", "Decoys", "Descent", "EqualityConstrained", "ExactSum", "FromScratch", "GramFactor", "KeyHistory",
    "LayerProblem", "LeastSquares", "NullSpace", "PlannedHistory", "Solver", "Update",
]  # fmt: skip
