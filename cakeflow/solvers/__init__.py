"""Solvers: closed-form weight changes. One abstract slot, leaves that compose by wrapping."""

from cakeflow.solvers.base import Solver
from cakeflow.solvers.descent import Descent
from cakeflow.solvers.equality import EqualityConstrained
from cakeflow.solvers.least_squares import LeastSquares
from cakeflow.solvers.null_space import NullSpace

__all__ = ["Descent", "EqualityConstrained", "LeastSquares", "NullSpace", "Solver"]
