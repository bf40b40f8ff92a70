"""Theorem 1 on dense matrices: the exact allocation, and what it is when the chain is trivial or linear."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cakeflow.allocators import Jacobian, LayerContext, Sequential
from cakeflow.allocators.jacobian import conjugate_gradients
from cakeflow.errors import AllocationWarning, ConfigError
from cakeflow.models.architecture import Site
from cakeflow.testing import DenseLinearMap

N, WIDTH = 3, 6


def matrices(count, spread=0.3, seed=0):
    gen = torch.Generator().manual_seed(seed)
    noise = torch.randn(count - 1, N, WIDTH, WIDTH, generator=gen, dtype=torch.float64)
    return [*(torch.eye(WIDTH, dtype=torch.float64) + spread * noise), torch.eye(WIDTH).double().expand(N, -1, -1)]


def context(index, weights, result):
    return LayerContext(Site(index, "mlp_out"), Site(9), index, weights, DenseLinearMap(result[index:]))


def residual(seed=1):
    return torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(weights, result, right):
    """delta of every layer by theorem 1, with the system formed and solved."""
    weights = weights.expand(N, -1)
    system = sum(weights[:, j, None, None] * m @ m.mT for j, m in enumerate(result))
    covector = torch.linalg.solve(system, right)
    return [weights[:, j, None] * torch.einsum("nij,ni->nj", m, covector) for j, m in enumerate(result)]


EXACT = Jacobian(tolerance=1e-13, iterations=200)
weights = st.lists(st.floats(0.05, 20), min_size=2, max_size=5).map(lambda w: torch.tensor(w, dtype=torch.float64))


@given(weights, st.integers(0, 99))
def test_equals_the_dense_solution(values, seed):
    result, right = matrices(len(values), seed=seed), residual(seed)
    expected = dense(values, result, right)[0]
    got = EXACT.allocate(right, context(0, values, result))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-8)


@given(weights)
def test_is_the_sequential_rule_when_every_layer_reaches_the_anchor_unchanged(values):
    identity, right = [torch.eye(WIDTH).double().expand(N, -1, -1)] * len(values), residual()
    for index in range(len(values)):
        here = context(index, values, identity)
        torch.testing.assert_close(EXACT.allocate(right, here), Sequential().allocate(right, here), rtol=1e-12, atol=0)


@given(weights, st.integers(0, 99))
def test_solving_again_before_each_layer_gives_the_one_shot_solution_of_a_linear_chain(values, seed):
    result, left = matrices(len(values), seed=seed), residual(seed)
    reference = dense(values, result, left)
    for index, expected in enumerate(reference):
        got = EXACT.allocate(left, context(index, values, result))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-8)
        left = left - torch.einsum("nij,nj->ni", result[index], got)
    torch.testing.assert_close(left, torch.zeros_like(left), rtol=0, atol=1e-8)


@given(weights, st.floats(1e-6, 1e6))
def test_only_ratios_of_weights_matter(values, scale):
    result, right = matrices(len(values)), residual()
    one, other = (EXACT.allocate(right, context(0, w, result)) for w in (values, values * scale))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_weights_may_differ_from_fact_to_fact():
    values = torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, 1.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    result, right = matrices(3), residual()
    got = EXACT.allocate(right, context(0, values, result))
    torch.testing.assert_close(got, dense(values, result, right)[0], rtol=0, atol=1e-10)


def test_the_last_layer_takes_what_is_left():
    values, result = torch.tensor([1.0, 2.0], dtype=torch.float64), matrices(2)
    assert torch.equal(EXACT.allocate(residual(), context(1, values, result)), residual())


def test_a_residual_of_zero_stays_zero():
    right = residual()
    right[1] = 0
    got = EXACT.allocate(right, context(0, torch.ones(3).double(), matrices(3)))
    assert not got[1].any()
    assert got[0].any()


def test_linear_in_the_residual():
    result, values = matrices(3), torch.ones(3).double()
    a, b = residual(1), residual(2)
    parts = [EXACT.allocate(r, context(0, values, result)) for r in (a, b, 2 * a - 3 * b)]
    torch.testing.assert_close(parts[2], 2 * parts[0] - 3 * parts[1], rtol=0, atol=1e-9)


def graded(spread, facts=1, width=64):
    """Maps of two layers whose system has eigenvalues from 2 to ``1 + spread``, in other directions for each fact."""
    gen = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(facts, width, width, generator=gen, dtype=torch.float64)).Q
    values = torch.logspace(0, 0.5, width, spread, dtype=torch.float64)
    return [basis * values @ basis.mT, torch.eye(width).double().expand(facts, -1, -1)]


def test_a_fact_with_no_weight_from_a_layer_on_takes_nothing_there():
    """Also at the value site's layer, which other facts edit, and without a word."""
    result, right = matrices(3), residual()
    values = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    first, second, last = (EXACT.allocate(right, context(index, values, result)) for index in range(3))
    assert (first.norm(dim=1) > 0).tolist() == [True] * 3
    assert (second.norm(dim=1) > 0).tolist() == [True, True, False]
    assert last.tolist() == [[0.0] * WIDTH, right[1].tolist(), [0.0] * WIDTH]


def test_steps_follow_the_need():
    """A system of an edited model, with a condition number of some thousands, takes more than a hundred steps."""
    result, right = graded(2500.0, width=400), torch.ones(1, 400, dtype=torch.float64)
    here = LayerContext(Site(0), Site(9), 0, torch.ones(2).double(), DenseLinearMap(result))
    share = Jacobian().allocate(right, here)
    system = result[0] @ result[0].mT + result[1]
    expected = torch.einsum("nij,ni->nj", result[0], torch.linalg.solve(system, right))
    assert 100 < here.numbers["steps"] < 200
    assert float((share - expected).norm() / expected.norm()) < 1e-2


def test_a_fact_that_is_not_solved_takes_its_best_iterate_and_is_named():
    easy, hard = matrices(2), graded(1e12, width=WIDTH)
    result = [torch.cat([a[:2], b]) for a, b in zip(easy, hard, strict=True)]
    values, right = torch.ones(2, dtype=torch.float64), residual()
    here = LayerContext(Site(3), Site(9), 0, values, DenseLinearMap(result), "request {0[0]}".format)
    with pytest.warns(
        AllocationWarning, match=r"^layer 3, request 2: .* after 8 steps, and the best iterates are used"
    ):
        share = Jacobian(tolerance=1e-10, iterations=8).allocate(right, here)
    torch.testing.assert_close(share[:2], dense(values, result, right)[0][:2], rtol=0, atol=1e-8)
    assert here.numbers == {"steps": 8}
    assert 0 < float(share[2].norm()) < float(right[2].norm())


def test_the_best_iterate_has_the_smallest_residual():
    (hard, _), right = graded(1e8), torch.ones(1, 64, dtype=torch.float64)
    left = [float(conjugate_gradients(lambda x: x @ hard[0], right, 1e-13, steps).residual) for steps in range(40)]
    assert left == sorted(left, reverse=True)
    solution = conjugate_gradients(lambda x: x @ hard[0], right, 1e-13, 39)
    measured = (right - solution.value @ hard[0]).norm() / right.norm()
    assert float(measured) == pytest.approx(left[-1], rel=1e-3)
    assert solution.steps.tolist() == [39]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_system_that_is_not_positive_definite_stops_alone(bad):
    scale, right = torch.tensor([[1.0], [bad], [2.0]], dtype=torch.float64), residual()
    solution = conjugate_gradients(lambda x: scale * x, right, 1e-6, 10)
    assert solution.steps.tolist() == [1, 0, 1]
    assert solution.residual.tolist() == [0, 1, 0]
    assert torch.equal(solution.value, right * torch.tensor([[1.0], [0.0], [0.5]], dtype=torch.float64))


@pytest.mark.parametrize(
    "settings", [{"tolerance": 0}, {"tolerance": 1}, {"iterations": 0}, {"tolerance": float("nan")}]
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(ConfigError, match="Jacobian"):
        Jacobian(**settings)


def test_a_context_without_a_linear_map_is_refused():
    here = LayerContext(Site(0, "mlp_out"), Site(1), 0, torch.ones(2).double())
    with pytest.raises(ConfigError, match="Jacobian needs the linear map"):
        EXACT.allocate(residual(), here)
