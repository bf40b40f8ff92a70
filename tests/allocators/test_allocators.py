"""One formula for the family: shares of what is left, and the special cases that carry names."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cakeflow.allocators import LayerContext, Sequential, ShareAllocator, shares_from_fractions
from cakeflow.errors import ConfigError
from cakeflow.models.architecture import Site

WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12).map(lambda w: torch.tensor(w, dtype=torch.float64))


def fractions_from_shares(shares):
    """The inverse: each share is taken from what the layers before left."""
    left, fractions = 1.0, []
    for share in shares.tolist():
        fractions.append(share * left)
        left -= fractions[-1]
    return torch.tensor(fractions, dtype=torch.float64), left


@given(WEIGHTS)
def test_shares_and_fractions_are_a_bijection(weights):
    fractions, left = fractions_from_shares(shares_from_fractions(weights))
    torch.testing.assert_close(fractions, weights / weights.sum(), rtol=1e-9, atol=1e-12)
    assert left == pytest.approx(0, abs=1e-12)


@given(WEIGHTS, st.floats(1e-6, 1e6))
def test_the_contract_of_shares(weights, factor):
    for power in (0.0, 0.5, 1.0):
        shares = Sequential(power).shares(weights)
        assert ((shares > 0) & (shares <= 1)).all()
        assert shares[-1] == 1
        torch.testing.assert_close(Sequential(power).shares(weights * factor), shares, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [1.0, 0.2, 1 / 3, 0.1, 1e-30])
def test_equal_weights_give_exactly_one_over_remaining(dtype, value):
    for layers in range(1, 30):
        shares = shares_from_fractions(torch.full((layers,), value, dtype=dtype))
        assert torch.equal(shares, 1 / torch.arange(layers, 0, -1, dtype=dtype))


def test_eq_6_by_hand():
    shares = shares_from_fractions(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    expected = torch.tensor([1 / 10, 2 / 9, 3 / 7, 1.0], dtype=torch.float64)
    torch.testing.assert_close(shares, expected, rtol=1e-15, atol=0)


def test_weights_per_fact_are_rows():
    weights = torch.tensor([[1.0, 1.0], [1.0, 3.0]])
    torch.testing.assert_close(shares_from_fractions(weights), torch.tensor([[0.5, 1.0], [0.25, 1.0]]))


@pytest.mark.parametrize(
    ("allocator", "weights", "expected"),
    [
        (Sequential(), [1, 1, 1, 1, 1], [1 / 5, 1 / 4, 1 / 3, 1 / 2, 1]),  # MEMIT, AlphaEdit
        (Sequential(0.5), [1, 1, 1, 1], [1 / 2, 1 / math.sqrt(3), 1 / math.sqrt(2), 1]),  # PMET
        (Sequential(0.0, "self"), [1, 1], [1, 1]),  # BLUE
        (Sequential(), [1], [1]),  # ROME
    ],
)
def test_special_cases(allocator, weights, expected):
    residual = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
    for index, share in enumerate(expected):
        context = LayerContext(Site(index, "mlp_out"), Site(9), index, torch.tensor(weights, dtype=torch.float64))
        torch.testing.assert_close(allocator.allocate(residual, context), share * residual, rtol=1e-12, atol=0)


def test_weights_per_fact_scale_each_fact_by_itself():
    residual, weights = torch.ones(2, 3), torch.tensor([[1.0, 1.0], [1.0, 3.0]])
    first = Sequential().allocate(residual, LayerContext(Site(0), Site(1), 0, weights))
    torch.testing.assert_close(first, torch.tensor([[0.5] * 3, [0.25] * 3]))


def test_an_allocator_of_ones_own_needs_shares_only():
    class Half(ShareAllocator):
        residual_at = "self"

        def shares(self, weights):
            return torch.full_like(weights, 0.5)

    residual = torch.ones(2, 3)
    assert torch.equal(Half().allocate(residual, LayerContext(Site(0), Site(0), 0, torch.ones(2))), residual / 2)


@pytest.mark.parametrize(
    "arguments", [{"power": -0.1}, {"power": 1.1}, {"power": float("nan")}, {"residual_at": "middle"}]
)
def test_bad_settings(arguments):
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        Sequential(**arguments)
