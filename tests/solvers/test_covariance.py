"""The number of small eigenvalues of a second moment, counted without computing them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cakeflow.solvers.covariance import Covariance, rank_below


@given(size=st.integers(1, 40), samples=st.integers(1, 60), power=st.floats(-6, 2), seed=st.integers(0, 2**31))
def test_eigenvalues_below_a_threshold_are_counted(size, samples, power, seed):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-3, 1, size, dtype=torch.float64)
    keys = torch.randn(samples, size, generator=generator, dtype=torch.float64) * scales
    moment, threshold = keys.T @ keys / samples, 10.0**power
    values = torch.linalg.eigvalsh(moment)
    # rounding may put these on either side
    near = int(((values - threshold).abs() < 1e-12 * float(values.max())).sum())
    assert abs(rank_below(moment, threshold) - int((values < threshold).sum())) <= near


@pytest.mark.parametrize("threshold", [-2.0, 0.0, 2.0])
def test_pivots_of_two_count_one_negative_eigenvalue(threshold):
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)  # 1 and -1: no pivot of one on the diagonal
    assert rank_below(swap, threshold) == {-2.0: 0, 0.0: 1, 2.0: 2}[threshold]


def test_a_weighted_one_differs_in_its_weight_alone():
    root = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = Covariance(root.T @ root, weight=3.0, threshold=0.1)
    twice = plain.weighted(2.0)
    assert (plain.weight, twice.weight, twice.threshold) == (3.0, 6.0, 0.1)
    assert twice.eigen[1].equal(plain.eigen[1])
    direct = torch.linalg.inv(6.0 * root.T @ root)
    torch.testing.assert_close(twice.unwhiten(twice.whiten(root, 0.0), 0.0), root @ direct, rtol=1e-9, atol=0)
