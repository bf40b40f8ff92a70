"""Weights of the history against the formula written key by key, alone and with everything inside it."""

from dataclasses import replace

import pytest
import torch
from cakeflow_streams import ConflictHistory, RankSearch, ResidualBlend
from cakeflow_streams.conflict import harmony
from hypothesis import given
from hypothesis import strategies as st
from layer_problems import LayerCase, close

from cakeflow import LeastSquares, NullSpace
from cakeflow.errors import ConfigError
from cakeflow.solvers import KeyHistory
from cakeflow.testing import SolverContract

COUNTS = {"n": st.integers(1, 5), "m": st.integers(1, 6), "seed": st.integers(0, 999)}


def by_hand(earlier, keys):
    """1 - max |cos|, key by key."""
    return torch.stack(
        [1 - max((p @ k).abs() / (p @ p).sqrt() / (k @ k).sqrt() for k in keys) for p in earlier]
    )  # fmt: skip


class TestContract(SolverContract):
    solver = ConflictHistory(LeastSquares(10.0))


class TestContractOfTheWholeMethod(SolverContract):
    solver = ResidualBlend(ConflictHistory(RankSearch(LeastSquares(10.0), block=2)))


@given(**COUNTS, scale=st.sampled_from([1e-9, 1.0, -3e5]))
def test_harmony(n, m, seed, scale):
    case = LayerCase(n, m, seed=seed)
    got = harmony(case.S, case.K)
    close(got, by_hand(case.S, case.K))
    assert bool(((got >= 0) & (got <= 1)).all())
    close(harmony(scale * case.S, case.K / scale), got)
    assert bool((harmony(torch.cat([case.S, -2 * case.K]), case.K)[m:] < 1e-15).all())
    across = torch.linalg.svd(case.K).Vh[n:]  # orthogonal to every new key
    close(harmony(across, case.K), torch.ones(len(across), dtype=torch.float64))


@pytest.mark.parametrize("by_depth", [True, False])
@given(**COUNTS, index=st.integers(0, 4), beta=st.sampled_from([0.5, 100.0]))
def test_the_dense_solution(by_depth, n, m, seed, index, beta):
    case = LayerCase(n, m, seed=seed, index=index)
    weights = by_hand(case.S, case.K) * beta * (index + 1 if by_depth else 1)
    close(ConflictHistory(LeastSquares(0.5), beta, by_depth).solve(replace(case.problem, covariance=None)).dense,
          case.dense(case.d_in, 0.5, weights))  # fmt: skip
    projected = ConflictHistory(NullSpace(LeastSquares(0.5)), beta, by_depth).solve(case.problem)
    close(projected.dense, case.dense(case.null, 0.5, weights))


@given(**COUNTS)
def test_a_key_that_comes_again_changes_nothing(n, m, seed):
    case = LayerCase(n, m, seed=seed)
    solver = ConflictHistory(NullSpace(LeastSquares(0.5)))
    history = KeyHistory(case.S)
    history.append(case.K[:1] * 3)
    close(solver.solve(replace(case.problem, history=history)).dense, solver.solve(case.problem).dense)


@given(seed=st.integers(0, 999))
def test_orthogonal_keys_that_count_once_are_the_plain_history(seed):
    case = LayerCase(n=2, seed=seed)
    history = KeyHistory(torch.linalg.svd(case.K).Vh[2:6] * 2)
    problem, plain = replace(case.problem, history=history), NullSpace(LeastSquares(0.5))
    close(ConflictHistory(plain, 1.0).solve(problem).dense, plain.solve(problem).dense)


def test_a_first_batch_is_left_alone():
    problem = LayerCase().without_history()
    assert torch.equal(
        ConflictHistory(LeastSquares(1.0)).solve(problem).dense, LeastSquares(1.0).solve(problem).dense
    )  # fmt: skip


def test_it_says_that_it_weighs_conflicts_wherever_it_stands():
    plain = NullSpace(LeastSquares(1.0))
    assert not plain.weighs_conflicts
    assert ConflictHistory(plain).weighs_conflicts
    assert ResidualBlend(ConflictHistory(plain)).weighs_conflicts


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_bad_settings(weight):
    with pytest.raises(ConfigError, match="weight must be above 0"):
        ConflictHistory(weight=weight)
