"""The queue of preservation against its formulas in matrices, and what is out of force in the journal."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from cakeflow_streams import PreservationQueue
from hypothesis import given, settings
from hypothesis import strategies as st

from cakeflow import LayerProblem, LeastSquares, NullSpace
from cakeflow.errors import ConfigError, ShapeError
from cakeflow.solvers import Covariance, KeyHistory
from cakeflow.testing import SolverContract

WIDTH, OUT = 7, 4
SIZES = st.lists(st.integers(1, 3), min_size=1, max_size=6)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Stream:
    """A weight that is edited batch by batch, with preserved keys K_0 (as columns) in the place of a covariance."""

    def __init__(self, seed, weight=0.5):
        self.seed, self.weight, self.count = seed, weight, 0
        self.K0 = randn(WIDTH, 40, seed=seed + 1)
        self.covariance = Covariance(self.K0 @ self.K0.T / 40, weight)
        self.original = randn(OUT, WIDTH, seed=seed + 2)
        self.W, self.history = self.original.clone(), KeyHistory()

    def problem(self, size):
        self.count += 1
        keys, residual = (randn(size, width, seed=self.seed + 100 * self.count + width) for width in (WIDTH, OUT))
        return LayerProblem(keys, residual, self.W, self.original, self.covariance, self.history)

    def edit(self, solver, size):
        problem = self.problem(size)
        update = solver.solve(problem)
        facts = [f"{self.count} {i}" for i in range(size)]
        self.history.append(problem.keys, facts, problem.values)
        self.W = self.W + update.dense
        return problem, update


class Official:
    """Steps of LyapLock's code: V = 1, Z and its floor sqrt(alpha D_base), a = 1 / sqrt(alpha D_base)."""

    def __init__(self, stream, alpha):
        self.K0, self.V0, self.alpha, self.weight = stream.K0, stream.original @ stream.K0, alpha, stream.weight
        self.W, self.D_base, self.a, self.Z = stream.original.clone(), None, 1.0, 1.0
        self.VKt, self.KKt = torch.zeros(OUT, WIDTH).double(), torch.zeros(WIDTH, WIDTH).double()

    def step(self, K, R):
        v0k0, k0k0, v0v0 = (x @ y.T / 40 for x, y in ((self.V0, self.K0), (self.K0, self.K0), (self.V0, self.V0)))
        price = self.a * self.Z * self.weight
        left = R @ K.T + price * (v0k0 - self.W @ k0k0) + self.VKt - self.W @ self.KKt
        self.W = self.W + left @ torch.linalg.inv(K @ K.T + price * k0k0 + self.KKt)
        D = float((k0k0 @ self.W.T @ self.W).trace() - 2 * (v0k0 @ self.W.T).trace() + v0v0.trace())
        if self.D_base is None:
            self.D_base = D
            self.Z = self.floor = (self.alpha * D) ** 0.5
            self.a = 1 / self.floor
        self.Z = max(self.Z + self.a * (D - self.alpha * self.D_base), self.floor)
        self.VKt, self.KKt = self.VKt + self.W @ K @ K.T, self.KKt + K @ K.T
        return price / self.weight, D


@settings(max_examples=60)
@given(SIZES, st.sampled_from([0.5, 1.5, 60.0]), st.sampled_from(["auto", "primal", "dual"]), st.integers(0, 99))
def test_a_stream_by_the_formulas_of_lyaplock(sizes, limit, form, seed):
    stream = Stream(seed)
    official = Official(stream, limit)
    for size in sizes:
        problem, update = stream.edit(PreservationQueue(LeastSquares(form=form), limit), size)
        queue, drift = official.step(problem.keys.T, problem.residual.T)
        scale = float(official.W.abs().max())
        torch.testing.assert_close(stream.W, official.W, rtol=0, atol=1e-9 * scale)
        assert update.numbers["queue"] == pytest.approx(queue, rel=1e-7)
        assert update.numbers["drift"] == pytest.approx(drift, rel=1e-7)


def test_the_queue_grows_while_the_drift_is_above_the_limit_and_holds_it_down():
    drifts = {}
    for limit in (0.5, 1e6):
        stream = Stream(3)
        numbers = [stream.edit(PreservationQueue(limit=limit), 2)[1].numbers for _ in range(8)]
        queues = [each["queue"] for each in numbers]
        drifts[limit] = numbers[-1]["drift"]
        for before, after in pairwise(numbers):
            step = before["drift"] / (limit * numbers[0]["drift"]) - 1
            assert after["queue"] == pytest.approx(max(1.0, before["queue"] + step), rel=1e-12)
        assert queues[0] == 1.0
        assert (max(queues) > 5) == (limit == 0.5)
    assert drifts[0.5] < 0.7 * drifts[1e6]


def test_without_a_limit_it_is_the_inner_solver():
    inner, stream = LeastSquares(0.3), Stream(5)
    for _ in range(3):
        problem, update = stream.edit(PreservationQueue(inner, None), 2)
        rest = KeyHistory()
        for rows in problem.history.batches[:-1]:  # the batch itself has joined it
            rest.append(problem.history.keys[rows])
        assert torch.equal(update.dense, inner.solve(replace(problem, history=rest)).dense)


def copied(history, count=None):
    """A history of the first batches, with nothing derived from it."""
    result = KeyHistory()
    for rows in history.batches[:count]:
        result.append(history.keys[rows].clone(), history.facts[rows], history.values[rows].clone())
    return result


def test_a_history_without_caches_gives_the_same_bits():
    stream, solver = Stream(7), PreservationQueue(limit=0.5)
    for size in (2, 1, 3, 2):
        before = copied(stream.history)
        problem, update = stream.edit(solver, size)
        again = solver.solve(replace(problem, history=before))
        assert torch.equal(again.dense, update.dense)
        assert again.numbers == update.numbers


def test_facts_that_are_out_of_force_leave_nothing_behind():
    stream, solver = Stream(11), PreservationQueue(limit=0.5)
    for size in (2, 2, 2):
        stream.edit(solver, size)
    problem = stream.problem(2)
    solver.solve(problem)
    other = solver.solve(replace(problem, history=stream.history.without(["2 0"])))
    alone = KeyHistory()
    for rows, chosen in zip(stream.history.batches, ([0, 1], [1], [0, 1]), strict=True):
        alone.append(stream.history.keys[rows][chosen], ["x"] * len(chosen), stream.history.values[rows][chosen])
    assert torch.equal(other.dense, solver.solve(replace(problem, history=alone)).dense)
    everything = stream.history.without(stream.history.facts)
    first = solver.solve(replace(problem, weight=stream.original, history=everything))
    assert torch.equal(first.dense, solver.solve(replace(problem, weight=stream.original, history=KeyHistory())).dense)


def test_a_first_batch_that_changes_nothing_sets_no_scale():
    stream, solver = Stream(13), PreservationQueue(limit=0.5)
    problem = stream.problem(2)
    stream.history.append(problem.keys, ["a", "b"], problem.keys @ stream.W.T)
    numbers = [stream.edit(solver, 2)[1].numbers for _ in range(2)]
    assert numbers[0]["queue"] == 1.0
    assert numbers[1]["queue"] == pytest.approx(2.0)  # one drift of the first batch that changed something, limit 0.5


def test_each_batch_is_solved_once(monkeypatch):
    stream, solves, solve = Stream(1), [], LeastSquares.solve
    monkeypatch.setattr(LeastSquares, "solve", lambda self, problem: solves.append(1) or solve(self, problem))
    for _ in range(4):
        stream.edit(PreservationQueue(limit=0.5), 2)
    assert len(solves) == 4


def test_missing_needs_and_bad_settings():
    problem = Stream(0).problem(2)
    with pytest.raises(ShapeError, match="PreservationQueue needs the covariance"):
        PreservationQueue().solve(replace(problem, covariance=None))
    edited = replace(problem, weight=problem.weight + 1)
    for history in (KeyHistory(), KeyHistory(problem.keys)):
        with pytest.raises(ConfigError, match=r"keys of earlier edits with their values: set history: true"):
            PreservationQueue().solve(replace(edited, history=history))
    stream = Stream(0)
    stream.edit(LeastSquares(1.0), 2)
    with pytest.raises(ShapeError, match="put it around solvers that transform keys"):
        NullSpace(PreservationQueue(), threshold=10.0).solve(stream.problem(2))
    for limit in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="PreservationQueue: limit must be a number above 0, or null"):
            PreservationQueue(limit=limit)


class TestPreservationQueue(SolverContract):
    solver = PreservationQueue(LeastSquares(0.1), limit=2.0)
