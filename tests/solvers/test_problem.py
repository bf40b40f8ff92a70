"""Covariances, problems and updates: pure numbers with shapes that are checked."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cakeflow import LayerProblem, Update
from cakeflow.errors import NumericalError, ShapeError
from cakeflow.solvers.covariance import Covariance
from cakeflow.solvers.history import KeyHistory


def moment(values, seed=0):
    """A symmetric matrix with given eigenvalues, and its eigenvectors as columns."""
    width = len(values)
    basis = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    vectors = torch.linalg.qr(basis).Q
    return (vectors * torch.tensor(values, dtype=torch.float64)) @ vectors.T, vectors


def randn(*shape, seed=9):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem(n=2, d_in=5, d_out=3, **changes):
    parts = {"keys": randn(n, d_in), "residual": randn(n, d_out), "weight": randn(d_out, d_in)}
    return LayerProblem(**{**parts, "original_weight": parts["weight"], **changes})


def test_eigenvalues_ascend_and_are_not_negative():
    values, vectors = Covariance(moment([3.0, 0.5, -1e-18, 0.0])[0]).eigen
    assert (values >= 0).all()
    assert (values.diff() >= 0).all()
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(4, dtype=torch.float64))


def test_a_known_eigenbasis_is_used():
    values, vectors = torch.tensor([1.0, 2.0]), torch.eye(2)
    assert Covariance(torch.eye(2), eigen=(values, vectors)).eigen[0] is values


def test_a_covariance_moves_part_by_part(monkeypatch):
    """Each part is copied once, on first use; the eigenbasis is computed where the moment is, and once for all."""
    calls, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: calls.append(matrix.device.type) or eigh(matrix))
    here = Covariance(moment([3.0, 0.5])[0], weight=7.0, threshold=0.3)
    assert here.to("cpu") is here
    assert here.moment is here.to("meta").to("cpu").moment
    there = here.to("meta")
    assert (len(there), there.weight, there.threshold) == (2, 7.0, 0.3)
    assert there.moment.device.type == "meta"
    assert there.moment is there.moment
    assert here.moment.device.type == "cpu"
    assert calls == []
    assert [part.device.type for part in there.eigen] == ["meta"] * 2
    assert there.eigen[1] is there.eigen[1]
    assert there.to("cpu").eigen[0] is here.to("meta").to("cpu").eigen[0] is here.eigen[0]
    assert there.to("cpu").eigen[1].stride() == here.eigen[1].stride()
    assert calls == ["cpu"]


def test_float32_moments_become_float64():
    assert Covariance(torch.eye(3)).moment.dtype == torch.float64


@settings(max_examples=50)
@given(st.integers(0, 6), st.integers(1, 8), st.integers(0, 50))
def test_projection_on_the_null_space(null, preserved, seed):
    values = [1e-6] * null + [1.0 + i for i in range(preserved)]
    c, vectors = moment(values, seed)
    covariance, keys = Covariance(c), randn(3, len(values), seed=seed)
    projected = covariance.project(keys, 0.02)
    assert covariance.rank(0.02) == null
    expected = keys @ vectors[:, :null] @ vectors[:, :null].T
    torch.testing.assert_close(projected, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(covariance.project(projected, 0.02), projected, rtol=0, atol=1e-9)
    assert float((projected @ vectors[:, null:]).abs().max()) < 1e-9


def test_both_ways_to_project_agree():
    """The smaller of the two bases is used; the results on either side of the half must be the same map."""
    c, _ = moment([1e-6] * 4 + [1.0] * 3)
    keys = randn(3, 7)
    through_null = Covariance(c).project(keys, 0.02)
    values, vectors = Covariance(c).eigen
    torch.testing.assert_close(through_null, keys @ vectors[:, :4] @ vectors[:, :4].T, rtol=0, atol=1e-12)
    assert values[3] < 0.02 < values[4]


@pytest.mark.parametrize(("weight", "ridge"), [(1.0, 0.0), (200.0, 0.0), (15_000.0, 10.0)])
def test_whitening_twice_equals_the_inverse(weight, ridge):
    c, _ = moment([0.3, 1.0, 2.0, 5.0])
    keys = randn(3, 4)
    expected = keys @ torch.linalg.inv(weight * c + ridge * torch.eye(4, dtype=torch.float64))
    covariance = Covariance(c, weight)
    whitened = covariance.whiten(keys, ridge)
    torch.testing.assert_close(covariance.unwhiten(whitened, ridge), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(whitened @ whitened.T, expected @ keys.T, rtol=1e-9, atol=1e-12)


def test_a_singular_moment_says_what_to_do():
    singular = Covariance(moment([0.0, 1.0, 2.0])[0])
    with pytest.raises(NumericalError, match=r"singular.*more tokens or set ridge above 0"):
        singular.whiten(randn(1, 3), 0.0)
    assert torch.isfinite(singular.whiten(randn(1, 3), 0.1)).all()
    with pytest.raises(NumericalError):
        Covariance(torch.zeros(3, 3)).whiten(randn(1, 3), 0.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"residual": randn(3, 3)},
        {"residual": randn(2, 4)},
        {"weight": randn(3, 6)},
        {"original_weight": randn(3, 4)},
        {"keys": randn(2, 4)},
        {"covariance": Covariance(torch.eye(4))},
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes):
    with pytest.raises(ShapeError, match=r"\d"):
        problem(**changes)


def test_in_null_space_projects_keys_and_history_and_drops_the_covariance():
    c, vectors = moment([1e-6, 1e-6, 1.0, 2.0, 3.0])
    p = vectors[:, :2] @ vectors[:, :2].T
    seen = KeyHistory(randn(4, 5, seed=1))
    full = problem(covariance=Covariance(c), history=seen)
    reduced = full.in_null_space(0.02)
    assert reduced.covariance is None
    torch.testing.assert_close(reduced.keys, full.keys @ p, rtol=0, atol=1e-9)
    torch.testing.assert_close(reduced.history.keys, seen.keys @ p, rtol=0, atol=1e-9)
    assert torch.equal(seen.keys, randn(4, 5, seed=1))
    assert torch.equal(reduced.residual, full.residual)
    assert torch.equal(reduced.weight, full.weight)


def test_two_thresholds_do_not_share_a_projected_history():
    c, _ = moment([1e-6, 1e-2, 1.0, 2.0, 3.0])
    full = problem(covariance=Covariance(c), history=KeyHistory(randn(4, 5, seed=1)))
    narrow, wide = full.in_null_space(1e-4), full.in_null_space(0.1)
    assert torch.linalg.matrix_rank(narrow.history.keys) == 1
    assert torch.linalg.matrix_rank(wide.history.keys) == 2


@pytest.mark.parametrize("rank", range(6))
def test_a_span_of_some_number_of_eigenvectors(rank):
    c, vectors = moment([1e-6, 1e-2, 1.0, 2.0, 3.0])
    full = problem(covariance=Covariance(c), history=KeyHistory(randn(4, 5, seed=1)))
    p, part = vectors[:, :rank] @ vectors[:, :rank].T, full.in_span(rank)
    torch.testing.assert_close(part.keys, full.keys @ p, rtol=0, atol=1e-9)
    torch.testing.assert_close(part.history.keys, full.history.keys @ p, rtol=0, atol=1e-9)
    assert part.covariance is None


@pytest.mark.parametrize("project", [lambda each: each.in_null_space(0.02), lambda each: each.in_span(2)])
def test_a_projection_needs_a_covariance(project):
    with pytest.raises(ShapeError, match="needs a covariance"):
        project(problem())


def test_histories_of_two_problems_are_their_own():
    assert problem().history is not problem().history


def test_update_as_factors_and_as_a_whole():
    left, right = randn(2, 3), randn(2, 5, seed=1)
    update = Update(right, left)
    assert update.dense.shape == (3, 5)
    torch.testing.assert_close(update.dense, sum(torch.outer(left[i], right[i]) for i in range(2)))
    whole = randn(3, 5)
    assert Update(whole).dense is whole


def test_values_are_what_each_key_is_to_get():
    keys, residual, weight = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 4), (3, 700), (700, 4)))
    problem = LayerProblem(keys, residual, weight.float(), weight.float())
    torch.testing.assert_close(problem.values, keys @ weight.float().double().T + residual, rtol=0, atol=1e-12)
