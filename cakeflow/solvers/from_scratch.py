"""Solving for all facts so far anew, whatever happened to their earlier changes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from cakeflow.errors import ConfigError
from cakeflow.solvers.base import Solver
from cakeflow.solvers.history import KeyHistory
from cakeflow.solvers.least_squares import LeastSquares
from cakeflow.solvers.problem import LayerProblem, Update


@dataclass(frozen=True)
class FromScratch(Solver):
    """``D - (W - W_0)``, D the inner change of the unedited weight W_0 for all facts so far, each with its own value.

    A sequence of least squares with a history equals one batch only as long as nothing else touches the weight. A
    filter around this solver, such as RECT's, may do so: its error is taken back by the next batch, not summed (the
    error carry of OTE, ``E = (F(D) - D) C_t``). Facts that are out of force leave nothing behind.

    Attributes:
        inner: A solver; its problem has the keys of all facts as new ones, and no history.
    """

    matrices = 4
    inner: Solver = field(default_factory=LeastSquares)

    def solve(self, problem: LayerProblem) -> Update:
        """Solve for all facts from the unedited weight, and take away what it was changed by already."""
        original, weight = problem.original_weight.double(), problem.weight.double()
        keys, values = problem.keys, problem.values
        history = problem.history
        if history.keys is not None and history.values is not None:
            keys, values = torch.cat([history.keys, keys]), torch.cat([history.values, values])
        elif history.keys is not None or (problem.earlier is None and not torch.equal(original, weight)):
            raise ConfigError(
                "FromScratch needs the keys of earlier edits with their values: set history: true, put it around "
                "solvers that transform keys, and start a new run where an older version edited"
            )
        residual = values - keys @ original.T
        whole = replace(
            problem, keys=keys, residual=residual, weight=original, history=KeyHistory(), prompt_keys=None, gap=None
        )
        return Update(self.inner.solve(whole).dense - (weight - original))
