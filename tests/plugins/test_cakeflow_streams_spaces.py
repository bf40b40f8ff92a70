"""Streams in spaces that shrink or are taken anew, against explicit projectors as the official codes update them."""

from dataclasses import replace

import pytest
import torch
from cakeflow_streams import RenewedNullSpace, UnusedSpace
from hypothesis import given
from hypothesis import strategies as st

from cakeflow import LayerProblem, LeastSquares, NullSpace
from cakeflow.errors import ConfigError, NumericalError, ShapeError
from cakeflow.solvers import Covariance, KeyHistory
from cakeflow.testing import SolverContract

WIDTH, OUT, THRESHOLD = 12, 3, 0.02
SIZES = st.lists(st.integers(1, 3), min_size=1, max_size=4)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def eye(size):
    return torch.eye(size, dtype=torch.float64)


def covariance(weight=3.0, null=10, seed=0):
    """A second moment of which all but two directions are below the threshold, though not at 0."""
    basis = torch.linalg.qr(randn(WIDTH, WIDTH, seed=seed)).Q
    values = torch.cat([torch.linspace(1e-4, 0.015, null), torch.linspace(0.5, 2.0, WIDTH - null)]).double()
    return Covariance((basis * values) @ basis.T, weight)


def stream(solver, sizes, seed, given=None, scale=1.0):
    """Yield the problem and the update of each batch of a stream whose weights stay 0."""
    history, given = KeyHistory(), covariance(seed=seed) if given is None else given
    weight = torch.zeros(OUT, WIDTH, dtype=torch.float64)
    for number, size in enumerate(sizes):
        keys, residual = scale * randn(size, WIDTH, seed=seed + 10 * number), randn(size, OUT, seed=seed + 500 + number)
        problem = LayerProblem(keys, residual, weight, weight, given, history)
        yield problem, solver.solve(problem)
        history.append(keys)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9 * float(expected.abs().max() + 1))


def null_projector(moment):
    values, vectors = torch.linalg.eigh(moment)
    return vectors[:, values < THRESHOLD] @ vectors[:, values < THRESHOLD].T


# ---- directions are used up ----


@given(SIZES, st.sampled_from([1.0, 4.0]), st.integers(0, 99))
def test_a_stream_uses_up_the_projector_of_evoedit(sizes, ridge, seed):
    """``D = R (K^T P K + L2 I)^-1 K^T P`` with keys as columns, then ``P <- P - Q Q^T``."""
    P = null_projector(covariance(seed=seed).moment)
    for problem, update in stream(NullSpace(UnusedSpace(LeastSquares(ridge))), sizes, seed):
        K, R = problem.keys.T, problem.residual.T
        close(update.dense, R @ torch.linalg.inv(K.T @ P @ K + ridge * eye(K.shape[1])) @ K.T @ P)
        assert update.is_plain
        Q, values, _ = torch.linalg.svd(P @ K, full_matrices=False)
        Q = Q[:, values > max(K.shape) * torch.finfo(K.dtype).eps * values.max()]
        P = P - Q @ Q.T


def test_earlier_keys_keep_their_outputs_exactly():
    for problem, update in stream(NullSpace(UnusedSpace()), [2, 3, 2], 5):
        if len(problem.history):
            P = null_projector(problem.covariance.moment)
            assert float((problem.history.keys @ P @ update.dense.T).abs().max()) < 1e-12
        assert float(update.dense.norm()) > 0.01


def test_the_first_batch_is_as_without():
    ((_, update),), ((_, plain),) = (
        list(stream(solver, [3], 0)) for solver in (UnusedSpace(LeastSquares(0.3)), LeastSquares(0.3))
    )
    assert torch.equal(update.dense, plain.dense)


def test_keys_that_nearly_depend_on_earlier_ones_leave_an_orthogonal_projector():
    history, keys = KeyHistory(randn(4, WIDTH)), randn(4, WIDTH)
    history.append(keys[:2] + 1e-10 * randn(2, WIDTH, seed=3))  # a repetition but for the tenth digit
    history.append(keys[2:])  # one without anything new
    nothing = torch.zeros(OUT, WIDTH, dtype=torch.float64)
    problem = LayerProblem(randn(1, WIDTH, seed=8), randn(1, OUT), nothing, nothing, None, history)
    row = UnusedSpace(LeastSquares(1.0)).solve(problem).right
    assert float((row @ history.keys.T).abs().max()) < 1e-14
    part = float(row @ problem.keys.T)  # kPk / (1 + kPk), so that |row|^2 is as below if P is its own square
    assert float(row.norm() ** 2) == pytest.approx(part * (1 - part), rel=1e-12)
    assert 0.1 < part < 1


def test_no_room_left_is_an_error():
    used = stream(UnusedSpace(), [6, 6, 1], 1)
    for _ in range(2):
        next(used)
    with pytest.raises(NumericalError, match=r"12 earlier keys span all keys of this batch.*null_threshold"):
        next(used)


def test_facts_left_out_give_their_directions_back():
    problem, _ = next(stream(UnusedSpace(), [2], 3))
    history, earlier_keys = KeyHistory(), randn(2, WIDTH, seed=77)
    history.append(earlier_keys, ["a", "b"])
    rest, alone = history.without(["b"]), KeyHistory(earlier_keys[:1])
    for earlier, other in ((rest, alone), (history.without(["a", "b"]), KeyHistory())):
        update, expected = (UnusedSpace().solve(replace(problem, history=each)) for each in (earlier, other))
        assert torch.equal(update.dense, expected.dense)


# ---- a null space taken anew ----


def test_the_cost_is_the_weight_of_the_covariance_by_default():
    own, named = (
        list(stream(RenewedNullSpace(every=2, cost=cost), [2, 2], 0, covariance(weight)))
        for cost, weight in ((None, 7.0), (7.0, 3.0))
    )
    assert all(torch.equal(a.dense, b.dense) for (_, a), (_, b) in zip(own, named, strict=True))


@given(SIZES, st.sampled_from([None, 1, 3, 4]), st.sampled_from([0.5, 3.0, 3000.0]), st.integers(0, 99))
def test_a_stream_by_the_formula_of_betaedit(sizes, every, weight, seed):
    """``solve(P (K K^T + S + l1 C) + l2 I, P K R^T)``, P of ``(S / t + l1 C) / (1 + l1)`` from time to time."""
    ridge, chosen = 10.0, covariance(7.0, seed=seed)
    C, S = chosen.moment, torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    P, done, last = null_projector(C), 0, 0
    for problem, update in stream(RenewedNullSpace(every=every, cost=weight), sizes, seed, chosen, scale=0.1):
        if every is not None and done - last >= every:
            P, last = null_projector((S / done + weight * C) / (1 + weight)), done
        K = problem.keys.T
        system = P @ (K @ K.T + S + weight * C) + ridge * eye(WIDTH)
        close(update.dense, torch.linalg.solve(system, P @ K @ problem.residual).T)
        assert torch.equal(update.left, problem.residual)
        assert update.is_plain
        S, done = S + K @ K.T, done + K.shape[1]


@pytest.mark.parametrize("form", ["dual", "primal"])
def test_a_renewal_changes_the_space(form):
    solvers = [RenewedNullSpace(LeastSquares(10.0, form), every) for every in (2, None)]
    first, second = (list(stream(solver, [2, 2, 2], 4, covariance(0.5), scale=0.3)) for solver in solvers)
    changes = [float((a.dense - b.dense).norm() / b.dense.norm()) for (_, a), (_, b) in zip(first, second, strict=True)]
    assert changes[0] < 1e-12
    assert min(changes[1:]) > 0.01


def test_without_renewal_and_cost_it_is_the_null_space():
    solvers = RenewedNullSpace(every=None, cost=0.0), NullSpace(LeastSquares(10.0))
    pairs = zip(*(stream(solver, [2, 3], 0) for solver in solvers), strict=True)
    for (_, update), (_, plain) in pairs:
        close(update.dense, plain.dense)


def test_eigenvalues_are_computed_once_for_each_renewal(monkeypatch):
    chosen, calls, eigh = covariance(), [], torch.linalg.eigh
    assert chosen.eigen is not None
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: calls.append(1) or eigh(matrix))
    assert len(list(stream(RenewedNullSpace(every=4), [2] * 6, 0, chosen, scale=0.1))) == 6
    assert len(calls) == 2 * 2  # after four and eight keys: of the moment, and of C inside its null space


def test_missing_needs_and_bad_settings():
    problem, _ = next(stream(LeastSquares(1.0), [2], 0))
    with pytest.raises(ShapeError, match="RenewedNullSpace needs the covariance"):
        RenewedNullSpace().solve(replace(problem, covariance=None))
    with pytest.raises(NumericalError, match=r"below threshold 1e-09 after 0 edits.*raise the threshold"):
        RenewedNullSpace(threshold=1e-9).solve(problem)
    for bad in ({"every": 0}, {"threshold": -1.0}, {"cost": -1.0}):
        with pytest.raises(ConfigError, match=r"RenewedNullSpace.* must be (above 0|0 or more), got"):
            RenewedNullSpace(**bad)


class TestUnusedSpace(SolverContract):
    solver = UnusedSpace()


class TestRenewedNullSpace(SolverContract):
    solver = RenewedNullSpace(every=2, threshold=0.5)
