"""The search for a rank against dense solves at every rank, and the official rule as it is written."""

import math
from dataclasses import replace

import pytest
import torch
from cakeflow_streams import RankSearch, ResidualBlend
from cakeflow_streams.rank import objectives, price
from hypothesis import given
from hypothesis import strategies as st
from layer_problems import THRESHOLD, LayerCase, close

from cakeflow import LeastSquares, NullSpace
from cakeflow.errors import ConfigError, NumericalError, ShapeError
from cakeflow.solvers import Covariance, KeyHistory
from cakeflow.testing import SolverContract

RIDGE = 0.5
COUNTS = {
    "n": st.integers(1, 6), "m": st.integers(0, 6), "d_in": st.integers(4, 12), "null": st.integers(1, 3),
    "seed": st.integers(0, 999),
}  # fmt: skip


def search(theta=None, block=2, gain=0.5, **settings):
    return RankSearch(LeastSquares(RIDGE), gain=gain, theta=theta, block=block, **settings)


class TestContract(SolverContract):
    solver = RankSearch(LeastSquares(10.0), block=2)


@given(**COUNTS, block=st.integers(1, 5))
def test_the_objective_in_three_forms(block, **counts):
    case = LayerCase(**counts)
    ones = torch.ones(case.m, dtype=torch.float64)
    got = objectives(case.problem, RIDGE, case.null, block)
    ranks = [*range(case.null, case.d_in, block), case.d_in]
    changes = [case.dense(rank, RIDGE, ones) for rank in ranks]
    close(got, torch.tensor([case.objective(D, RIDGE, ones) for D in changes], dtype=torch.float64))
    close(got, torch.stack([case.R.square().sum() - ((case.K @ D.T) * case.R).sum() for D in changes]))
    rows, residual = torch.cat([case.K, case.S]), torch.cat([case.R, case.R.new_zeros(case.m, 4)])
    for J, rank in zip(got.tolist(), ranks, strict=True):
        gram = rows @ case.projector(rank) @ rows.T + RIDGE * torch.eye(len(rows)).double()
        dual = RIDGE * (residual * torch.linalg.solve(gram, residual)).sum()
        assert float(dual) == pytest.approx(J, rel=1e-9)
    assert bool((got.diff() <= 0).all())


def official(case, theta, block):
    """The rank by dense solves and the rule as the official code has it."""
    ones = torch.ones(case.m, dtype=torch.float64)

    def at(rank):
        return case.objective(case.dense(rank, RIDGE, ones), RIDGE, ones)

    rank = case.null
    while rank < case.d_in:
        wider = min(rank + block, case.d_in)
        if not (at(rank) - at(wider)) / at(rank) > block * theta:
            break
        rank = wider
    return rank


@given(**COUNTS, block=st.integers(1, 5), theta=st.sampled_from([0.0, 0.003, 0.02, 0.1]))
def test_the_official_rule(block, theta, **counts):
    case = LayerCase(**counts)
    update = search(theta, block).solve(case.problem)
    rank = official(case, theta, block)
    assert update.numbers["rank"] == rank
    D = case.dense(rank, RIDGE, torch.ones(case.m, dtype=torch.float64))
    close(update.dense, D)
    close(update.dense @ case.projector(rank), D)
    assert update.numbers["price"] == pytest.approx(float((D @ case.C @ D.T).trace()), rel=1e-9)


@given(**COUNTS, block=st.integers(1, 5), gain=st.sampled_from([0.0, 0.3, 0.7, 1.0, 2.0]))
def test_a_block_has_to_bring_a_part_of_the_mean(block, gain, **counts):
    case = LayerCase(**counts)
    objective = objectives(case.problem, RIDGE, case.null, block).tolist()
    mean, accepted = (objective[0] - objective[-1]) / (len(objective) - 1), 0
    while accepted < len(objective) - 1 and objective[accepted] - objective[accepted + 1] > gain * mean:
        accepted += 1
    update = search(gain=gain, block=block).solve(case.problem)
    assert update.numbers["rank"] == min(case.null + accepted * block, case.d_in)


@given(**COUNTS)
def test_the_ends_of_the_search(**counts):
    case = LayerCase(**counts)
    plain = NullSpace(LeastSquares(RIDGE))
    for closed in (search(math.inf), search(gain=math.inf)):
        assert torch.equal(closed.solve(case.problem).dense, plain.solve(case.problem).dense)
    free = search(-1.0).solve(case.problem)
    assert free.numbers["rank"] == case.d_in
    close(free.dense, LeastSquares(RIDGE).solve(replace(case.problem, covariance=None)).dense)


@pytest.mark.parametrize("theta", [None, -1.0, 0.0, 0.1, math.inf])
def test_where_nothing_is_to_gain_the_search_stops(theta):
    case = LayerCase()
    problem = replace(case.problem, residual=torch.zeros_like(case.R))
    assert float(objectives(problem, RIDGE, case.null, 2).abs().max()) == 0
    update = search(theta).solve(problem)
    assert update.numbers == {"rank": case.null, "price": 0.0}
    assert float(update.dense.abs().max()) == 0


def test_a_full_null_space_has_no_blocks():
    case = LayerCase()
    update = search(threshold=1e6).solve(case.problem)
    assert update.numbers["rank"] == case.d_in
    assert len(objectives(case.problem, RIDGE, case.d_in, 2)) == 1


def test_equal_eigenvalues_are_parted():
    """A threshold could not: every eigenvalue is the same."""
    case = LayerCase(d_in=8)
    problem = replace(case.problem, covariance=Covariance(torch.eye(8, dtype=torch.float64)))
    update = search(gain=0.0, threshold=THRESHOLD, block=3).solve(problem)
    assert update.numbers["rank"] == 8
    assert torch.linalg.matrix_rank(problem.in_span(3).keys) == 3


def test_the_price_of_a_dense_update():
    case = LayerCase()
    factors = search(0.0).solve(case.problem)
    dense = replace(factors, right=factors.dense, left=None)
    assert price(dense, case.problem.covariance) == pytest.approx(factors.numbers["price"], rel=1e-12)


def test_a_history_is_put_into_the_eigenbasis_once(monkeypatch):
    """Weights change with every batch; the coordinates of earlier keys do not."""
    case, history = LayerCase(), KeyHistory()
    history.append(case.S)
    problem = replace(case.problem, history=history.weighted(torch.full((4,), 2.0).double()))
    first = objectives(problem, RIDGE, case.null, 2)
    monkeypatch.setattr(KeyHistory, "append", lambda *_: pytest.fail("keys were transformed again"))
    child, _ = history.derive("eigenbasis", lambda keys: pytest.fail("keys were transformed again"), case.K)
    close(child.keys, case.S @ problem.covariance.eigen[1])
    assert len(first) == 4


def test_errors():
    with pytest.raises(ShapeError, match="needs the covariance"):
        search().solve(replace(LayerCase().problem, covariance=None))
    with pytest.raises(NumericalError, match="nothing could change; raise the threshold"):
        search(math.inf, threshold=1e-9).solve(LayerCase().problem)
    broken = replace(LayerCase().problem, keys=LayerCase().K * math.nan)
    with pytest.raises(NumericalError, match="set ridge higher"):
        search().solve(broken)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"inner": LeastSquares()}, "ridge above 0"),
        ({"inner": ResidualBlend(LeastSquares(1.0))}, "must be LeastSquares"),
        ({"threshold": 0.0}, "threshold must be above 0"),
        ({"block": 0}, "block must be above 0"),
        ({"gain": -0.1}, "gain must be 0 or more, got -0.1"),
        ({"gain": math.nan}, "gain must be 0 or more"),
        ({"theta": math.nan}, "theta must be a number"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ConfigError, match=words):
        RankSearch(**settings)
