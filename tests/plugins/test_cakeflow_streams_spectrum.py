"""The guard of a weight's strongest directions against projectors from a whole singular value decomposition."""

from dataclasses import replace

import pytest
import torch
from cakeflow_restrain import Rect
from cakeflow_streams import SpectralGuard
from hypothesis import given
from hypothesis import strategies as st

from cakeflow import LayerProblem, LeastSquares
from cakeflow.errors import ConfigError
from cakeflow.solvers import Covariance, Descent, EqualityConstrained, KeyHistory
from cakeflow.testing import SolverContract

SHAPES = st.sampled_from([(4, 9), (9, 4), (6, 6)])
SHARES = st.sampled_from([0.05, 0.1, 0.5, 0.9])


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem(shape=(4, 9), seed=0):
    """Three facts and five earlier keys at a weight that has changed since."""
    (d_out, d_in), factor = shape, randn(shape[1], shape[1], seed=seed + 9)
    return LayerProblem(
        keys=randn(3, d_in, seed=seed),
        residual=randn(3, d_out, seed=seed + 1),
        weight=randn(*shape, seed=seed + 2),
        original_weight=randn(*shape, seed=seed + 3),
        covariance=Covariance(factor @ factor.T, weight=2.0),
        history=KeyHistory(randn(5, d_in, seed=seed + 4)),
    )


def strongest(weight, share, power=2):
    """Projectors of the left and right singular vectors, one more until their share of the energy exceeds ``share``."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    energy, count = (values**power).tolist(), 0
    while sum(energy[:count]) <= share * sum(energy):
        count += 1
    return left[:, :count] @ left[:, :count].T, right[:count].T @ right[:count]


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10 * float(expected.abs().max() + 1))


@given(SHAPES, SHARES, st.sampled_from([1, 2]), st.sampled_from([0.5, 1.0]), st.integers(0, 99))
def test_both_sides_by_the_formula_of_revive(shape, share, power, strength, seed):
    task = problem(shape, seed)
    outputs, inputs = strongest(task.original_weight, share, power)
    change = LeastSquares(0.3).solve(task).dense
    eye_out, eye_in = (torch.eye(size, dtype=torch.float64) for size in shape)
    update = SpectralGuard(LeastSquares(0.3), share, strength, power).solve(task)
    close(update.dense, (eye_out - strength * outputs) @ change @ (eye_in - strength * inputs))
    assert update.left.shape == (3, shape[0])
    assert not update.is_plain
    if strength == 1:
        assert float((update.dense @ inputs).abs().max()) < 1e-10
        assert float((outputs @ update.dense).abs().max()) < 1e-10


SPHERE = SpectralGuard(LeastSquares(0.3), 0.5, 0.5, sides="input", unit_rows=True, weight="present")


@given(SHAPES, st.sampled_from(["present", "original"]), st.integers(0, 99))
def test_inputs_by_the_formula_of_sphere(shape, weight, seed):
    """Eigenvectors of ``W^T W / d_out`` with rows of norm 1, one more than have a cumulative share of at most eta."""
    task = problem(shape, seed)
    rows = task.weight if weight == "present" else task.original_weight
    unit = rows / rows.norm(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(unit.T @ unit / shape[0])
    values, vectors = values.flip(0), vectors.flip(1)
    count = 1 + int((values.cumsum(0) / values.sum() <= 0.5).sum())
    basis = vectors[:, :count]
    update = replace(SPHERE, weight=weight).solve(task)
    plain = LeastSquares(0.3).solve(task)
    close(update.dense, plain.dense @ (torch.eye(shape[1], dtype=torch.float64) - 0.5 * basis @ basis.T))
    assert update.is_plain
    assert torch.equal(update.left, task.residual)


class WithGradients(LeastSquares):
    """A solver whose changes have the gradients that made them."""

    def solve(self, problem):
        return replace(super().solve(problem), gradients=problem.residual)


@pytest.mark.parametrize("inner", [Descent(steps=2), LeastSquares(0.3), Rect(LeastSquares(0.3))])
@pytest.mark.parametrize("neutral", [{"share": 0.0}, {"strength": 0.0}])
def test_neutral_settings_change_nothing(inner, neutral):
    task = with_loss(problem())
    update, plain = SpectralGuard(inner, **neutral).solve(task), inner.solve(task)
    assert torch.equal(update.dense, plain.dense)
    assert update.is_plain == plain.is_plain
    assert (update.deferred is None) == (plain.deferred is None)


def test_a_solver_that_reads_earlier_keys_from_its_changes_is_not_guarded():
    task = with_loss(problem())
    inner = WithGradients(0.3)
    with pytest.raises(ConfigError, match="reads the keys of earlier batches from their changes"):
        SpectralGuard(inner).solve(task)
    assert SpectralGuard(inner, share=0.0).solve(task).gradients is not None


def with_loss(task):
    """The problem with half of the squared distance of the change from 1 as its loss."""
    return replace(task, loss=lambda change: (float((change - 1).square().sum() / 2), change - 1))


def test_whole_and_deferred_changes_are_guarded_too():
    task = with_loss(problem())
    outputs, inputs = strongest(task.original_weight, 0.1)

    def apart(change):
        return change - outputs @ change - change @ inputs + outputs @ change @ inputs

    whole = SpectralGuard(Descent(steps=2)).solve(task)
    assert whole.left is None
    close(whole.dense, apart(Descent(steps=2).solve(task).dense))
    masked = SpectralGuard(Rect(LeastSquares(0.3))).solve(task)
    close(masked.dense, apart(LeastSquares(0.3).solve(task).dense))
    close(masked.deferred.dense, apart(Rect(LeastSquares(0.3)).solve(task).deferred.dense))
    assert SpectralGuard().solve(task).deferred is None


def test_a_constraint_around_a_guard_of_inputs_is_met_and_around_both_sides_refused():
    task = problem()
    update = EqualityConstrained(SPHERE).solve(task)
    close(task.keys @ update.dense.T, task.residual)
    with pytest.raises(ConfigError, match="no plain factors"):
        EqualityConstrained(SpectralGuard()).solve(task)


def test_directions_of_the_original_weight_are_computed_once(monkeypatch):
    task, calls, eigh = problem(), [], torch.linalg.eigh
    LeastSquares().solve(task)  # the eigenbasis of the covariance
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: calls.append(1) or eigh(matrix))
    for solver in (SpectralGuard(), SPHERE):
        for _ in range(2):
            solver.solve(task)
            task.history.append(randn(1, 9))
    assert len(calls) == 1 + 2


def test_a_weight_of_zeros_has_no_directions():
    task = problem()
    zero = replace(task, original_weight=torch.zeros_like(task.weight))
    assert torch.equal(SpectralGuard().solve(zero).dense, LeastSquares().solve(zero).dense)


def test_a_half_precision_weight_is_read_in_double():
    task = problem()
    half = replace(task, original_weight=task.original_weight.bfloat16())
    exact = replace(task, original_weight=half.original_weight.double())
    assert torch.equal(SpectralGuard().solve(half).dense, SpectralGuard().solve(exact).dense)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: SpectralGuard(share=1.0), "share must lie in .*got 1.0"),
        (lambda: SpectralGuard(share=float("nan")), "share must lie"),
        (lambda: SpectralGuard(strength=1.5), "strength must lie in .*got 1.5"),
        (lambda: SpectralGuard(power=3), "power must be 1 or 2, got 3"),
        (lambda: SpectralGuard(sides="left"), "sides must be one of"),
        (lambda: SpectralGuard(weight="now"), "weight must be one of"),
    ],
)
def test_bad_settings(build, words):
    with pytest.raises(ConfigError, match=words):
        build()


class TestRevive(SolverContract):
    solver = SpectralGuard(LeastSquares(0.3))


class TestSphere(SolverContract):
    solver = SPHERE
