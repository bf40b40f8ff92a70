"""Theorem 1 on dense matrices: the exact allocation, and what it is when the chain is trivial or linear."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cakeflow.allocators import Jacobian, LayerContext, Sequential
from cakeflow.allocators.jacobian import conjugate_gradients
from cakeflow.errors import ConfigError, NumericalError
from cakeflow.models.architecture import Site
from cakeflow.testing import DenseLinearMap

N, WIDTH = 3, 6


def matrices(count, spread=0.3, seed=0):
    gen = torch.Generator().manual_seed(seed)
    noise = torch.randn(count - 1, N, WIDTH, WIDTH, generator=gen, dtype=torch.float64)
    return [*(torch.eye(WIDTH, dtype=torch.float64) + spread * noise), torch.eye(WIDTH).double().expand(N, -1, -1)]


def context(index, weights, found):
    return LayerContext(Site(index, "mlp_out"), Site(9), index, weights, DenseLinearMap(found[index:]))


def residual(seed=1):
    return torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(weights, found, right):
    """delta of every layer by theorem 1, with the system formed and solved."""
    weights = weights.expand(N, -1)
    system = sum(weights[:, j, None, None] * m @ m.mT for j, m in enumerate(found))
    covector = torch.linalg.solve(system, right)
    return [weights[:, j, None] * torch.einsum("nij,ni->nj", m, covector) for j, m in enumerate(found)]


EXACT = Jacobian(tolerance=1e-13, iterations=200)
weights = st.lists(st.floats(0.05, 20), min_size=2, max_size=5).map(lambda w: torch.tensor(w, dtype=torch.float64))


@given(weights, st.integers(0, 99))
def test_equals_the_dense_solution(values, seed):
    found, right = matrices(len(values), seed=seed), residual(seed)
    wanted = dense(values, found, right)[0]
    got = EXACT.allocate(right, context(0, values, found))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-8)


@given(weights)
def test_is_the_sequential_rule_when_every_layer_reaches_the_anchor_unchanged(values):
    identity, right = [torch.eye(WIDTH).double().expand(N, -1, -1)] * len(values), residual()
    for index in range(len(values)):
        here = context(index, values, identity)
        torch.testing.assert_close(EXACT.allocate(right, here), Sequential().allocate(right, here), rtol=1e-12, atol=0)


@given(weights, st.integers(0, 99))
def test_solving_again_before_each_layer_gives_the_one_shot_solution_of_a_linear_chain(values, seed):
    found, left = matrices(len(values), seed=seed), residual(seed)
    wanted = dense(values, found, left)
    for index, expected in enumerate(wanted):
        got = EXACT.allocate(left, context(index, values, found))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-8)
        left = left - torch.einsum("nij,nj->ni", found[index], got)
    torch.testing.assert_close(left, torch.zeros_like(left), rtol=0, atol=1e-8)


@given(weights, st.floats(1e-6, 1e6))
def test_only_ratios_of_weights_matter(values, scale):
    found, right = matrices(len(values)), residual()
    one, other = (EXACT.allocate(right, context(0, w, found)) for w in (values, values * scale))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_weights_may_differ_from_fact_to_fact():
    values = torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, 1.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    found, right = matrices(3), residual()
    got = EXACT.allocate(right, context(0, values, found))
    torch.testing.assert_close(got, dense(values, found, right)[0], rtol=0, atol=1e-10)


def test_the_last_layer_takes_what_is_left():
    values, found = torch.tensor([1.0, 2.0], dtype=torch.float64), matrices(2)
    assert torch.equal(EXACT.allocate(residual(), context(1, values, found)), residual())


def test_a_residual_of_zero_stays_zero():
    right = residual()
    right[1] = 0
    got = EXACT.allocate(right, context(0, torch.ones(3).double(), matrices(3)))
    assert not got[1].any()
    assert got[0].any()


def test_linear_in_the_residual():
    found, values = matrices(3), torch.ones(3).double()
    a, b = residual(1), residual(2)
    parts = [EXACT.allocate(r, context(0, values, found)) for r in (a, b, 2 * a - 3 * b)]
    torch.testing.assert_close(parts[2], 2 * parts[0] - 3 * parts[1], rtol=0, atol=1e-9)


def test_too_few_steps_are_an_error():
    with pytest.raises(NumericalError, match="after 1 steps"):
        Jacobian(tolerance=1e-12, iterations=1).allocate(residual(), context(0, torch.ones(3).double(), matrices(3)))


@pytest.mark.parametrize("bad", [float("nan"), -1.0])
def test_a_system_that_is_not_positive_definite_is_an_error(bad):
    with pytest.raises(NumericalError, match="positive definite"):
        conjugate_gradients(lambda x: bad * x, residual(), 1e-6, 10)


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
