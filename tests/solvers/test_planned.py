"""The planned history against the formula of HSE's code, written out densely."""

import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cakeflow import LayerProblem, LeastSquares, NullSpace
from cakeflow.errors import ConfigError, RequestWarning
from cakeflow.solvers import Covariance, KeyHistory, PlannedHistory
from cakeflow.testing import SolverContract

WIDTH, OUT = 7, 3


class TestPlannedHistory(SolverContract):
    solver = PlannedHistory(LeastSquares(0.1), planned=20)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem(sizes, n=2, seed=0, index=1):
    history, weight, root = KeyHistory(), randn(OUT, WIDTH, seed=seed + 1), randn(WIDTH, WIDTH, seed=seed + 2)
    for size, number in zip(sizes, range(len(sizes)), strict=True):
        history.append(randn(size, WIDTH, seed=seed + 10 + number))
    covariance = Covariance(root @ root.T / WIDTH, weight=3.0)
    keys, residual = randn(n, WIDTH, seed=seed + 3), randn(n, OUT, seed=seed + 4)
    return LayerProblem(keys, residual, weight, weight, covariance, history, index=index)


def dense(problem, alpha):
    """``R K^T (lambda C + alpha S + K K^T)^-1`` with keys as columns, as HSE's code writes it."""
    K, S = problem.keys.T, 0.0 if problem.history.keys is None else problem.history.keys.T @ problem.history.keys
    system = problem.covariance.weight * problem.covariance.moment + alpha * S + K @ K.T
    return problem.residual.T @ K.T @ torch.linalg.inv(system)


@pytest.mark.parametrize("form", ["dual", "primal"])
@given(sizes=st.lists(st.integers(1, 4), max_size=4), planned=st.integers(20, 90), seed=st.integers(0, 99))
def test_earlier_keys_count_as_the_planned_ones(form, sizes, planned, seed):
    case, m = problem(sizes, seed=seed), sum(sizes)
    update = PlannedHistory(LeastSquares(form=form), planned=planned).solve(case)
    want = dense(case, planned / m if m else 1.0)
    torch.testing.assert_close(update.dense, want, rtol=1e-8, atol=1e-10)
    assert len(case.history) == m  # the journal's own history stays as it is


@given(batches=st.integers(1, 5), size=st.integers(1, 3), total=st.integers(6, 12))
def test_with_equal_batches_alpha_is_that_of_the_code(batches, size, total):
    """Floor(N / size) batches are planned, ``batches`` are done."""
    planned = total * size
    assert PlannedHistory(planned=planned).factor(batches * size) == pytest.approx((planned // size) / batches)


@given(st.permutations([1, 1, 2, 3]), st.integers(0, 9))
def test_the_weighted_history_does_not_depend_on_how_it_was_cut(sizes, seed):
    """Alpha S of seven keys, in batches of any sizes, and key by key."""
    keys, solver = randn(7, WIDTH, seed=seed), PlannedHistory(planned=30)
    whole = problem([], seed=seed)
    updates = []
    for cut in (sizes, [7], [1] * 7):
        history = KeyHistory()
        for part in keys.split(list(cut)):
            history.append(part)
        updates.append(solver.solve(replace(whole, history=history)).dense)
    for each in updates[1:]:
        torch.testing.assert_close(each, updates[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("inner", [LeastSquares(0.2), NullSpace(LeastSquares(10.0), threshold=0.3)])
def test_planned_as_many_as_there_are_is_the_inner_solver(inner):
    case = problem([2, 3])
    assert torch.equal(PlannedHistory(inner, planned=5).solve(case).dense, inner.solve(case).dense)


def test_it_composes_with_a_null_space_in_either_order():
    case, inner = problem([2, 3]), LeastSquares(10.0)
    outside = PlannedHistory(NullSpace(inner, threshold=0.3), planned=40).solve(case).dense
    inside = NullSpace(PlannedHistory(inner, planned=40), threshold=0.3).solve(case).dense
    torch.testing.assert_close(outside, inside, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(outside, NullSpace(inner, threshold=0.3).solve(case).dense)


def test_past_the_plan_the_history_counts_once_and_one_warning_says_so():
    solver, sizes = PlannedHistory(planned=5), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            for index in range(3):
                case = problem(sizes, index=index)
                update = solver.solve(case)
            torch.testing.assert_close(update.dense, dense(case, max(1.0, 5 / sum(sizes)) if sizes else 1.0))
            sizes = [*sizes, 2]
    (warning,) = [each for each in caught if issubclass(each.category, RequestWarning)]
    assert "more than the 5 planned keys" in str(warning.message)


@pytest.mark.parametrize("planned", [0, -3, 2.5, True])
def test_bad_plans_are_refused(planned):
    with pytest.raises(ConfigError, match=r"PlannedHistory\.planned must be a whole number"):
        PlannedHistory(planned=planned)
