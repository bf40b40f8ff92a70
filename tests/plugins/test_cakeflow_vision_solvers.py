"""The relative ridge against a dense formula."""

import pytest
import torch
from cakeflow_vision import RelativeRidge

from cakeflow.errors import ConfigError, ShapeError
from cakeflow.solvers import Covariance, LayerProblem
from cakeflow.testing import SolverContract


class TestRelativeRidge(SolverContract):
    solver = RelativeRidge(0.1)


def test_the_ridge_is_in_proportion_to_the_moment():
    draw = torch.Generator().manual_seed(0)
    keys, residual, others = (torch.randn(n, d, generator=draw).double() for n, d in ((4, 12), (4, 3), (6, 12)))
    weight, moment = torch.randn(3, 12, generator=draw).double(), others.T @ others / 6
    problem = LayerProblem(keys, residual, weight, weight, covariance=Covariance(moment, weight=40.0))
    ridge = 0.01 * 40 * moment.diagonal().mean()
    system = 40 * moment + keys.T @ keys + ridge * torch.eye(12).double()
    expected = residual.T @ keys @ torch.linalg.inv(system)
    torch.testing.assert_close(RelativeRidge(0.01).solve(problem).dense, expected, rtol=1e-10, atol=1e-10)


def test_what_it_needs_is_said():
    with pytest.raises(ConfigError, match="share must be above 0"):
        RelativeRidge(0.0)
    keys, weight = torch.ones(1, 2).double(), torch.ones(1, 2).double()
    with pytest.raises(ShapeError, match="needs the covariance"):
        RelativeRidge().solve(LayerProblem(keys, torch.ones(1, 1).double(), weight, weight))
