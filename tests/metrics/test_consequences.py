"""Metrics of consequences against sums written out."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cakeflow.errors import ShapeError
from cakeflow.metrics.consequences import ObjectShift, jensen_shannon


def logs(seed, size):
    return torch.randn(2, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).unbind()


@given(st.integers(0, 999), st.integers(2, 7))
def test_the_divergence_is_that_of_its_definition(seed, size):
    before, after = logs(seed, size)
    p, q = before.exp() / before.exp().sum(), after.exp() / after.exp().sum()
    pairs = [(float(a), float(b), float(a + b) / 2) for a, b in zip(p, q, strict=True)]
    expected = sum(0.5 * (a * math.log(a / m) + b * math.log(b / m)) for a, b, m in pairs)
    assert float(jensen_shannon(before, after)) == pytest.approx(expected, abs=1e-12)
    assert float(jensen_shannon(after, before)) == pytest.approx(expected, abs=1e-12)
    assert float(jensen_shannon(before, before + 3)) == pytest.approx(0, abs=1e-12)


@given(st.integers(0, 999), st.integers(2, 7), st.integers(0, 1))
def test_a_list_of_objects(seed, size, edited):
    before, after = logs(seed, size)
    metric = ObjectShift()
    metric.update(before, after, edited)
    lost = [float(b > a) for i, (b, a) in enumerate(zip(before, after, strict=True)) if i != edited]
    values = {name: float(value) for name, value in metric.compute().items()}
    share = sum(lost) / len(lost)
    expected = {"distortion": float(jensen_shannon(before, after)), "ignored": share, "failed": float(share > 0.5)}
    assert values == pytest.approx(expected, abs=1e-6)


def test_lists_are_averaged_and_processes_merge():
    metric, other = ObjectShift(), ObjectShift()
    metric.update(torch.tensor([0.0, 0.0]), torch.tensor([0.0, -1.0]), 0)
    other.update(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0]), 0)
    metric.merge_state(other)
    assert (float(metric.compute()["ignored"]), float(metric.compute()["failed"])) == (0.5, 0.5)


@pytest.mark.parametrize(("before", "after"), [([0.0], [0.0]), ([0.0, 0.0], [0.0]), ([[0.0, 0.0]], [[0.0, 0.0]])])
def test_lists_of_another_shape(before, after):
    with pytest.raises(ShapeError, match="one log-probability for each of two objects or more"):
        ObjectShift().update(torch.tensor(before), torch.tensor(after), 0)
