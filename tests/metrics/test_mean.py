"""The mean over items: against the sum and the count, whatever the batches."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cakeflow.metrics import Mean


class Numbers(Mean):
    """Of numbers as they are."""

    def update(self, values):
        self.add(values)


numbers = st.lists(st.floats(-1e6, 1e6), max_size=8)


@given(st.lists(numbers, min_size=1, max_size=4))
def test_it_is_the_mean_of_all_items_in_any_batches(batches):
    metric, flat = Numbers(), [each for batch in batches for each in batch]
    for place, batch in enumerate(batches):
        metric.update(torch.tensor(batch, dtype=torch.float64) if place % 2 else iter(batch))
    assert int(metric.items) == len(flat)
    value = float(metric.compute())
    assert math.isnan(value) if not flat else value == pytest.approx(sum(flat) / len(flat), rel=1e-5, abs=1e-5)


def test_truth_values_are_ones_and_zeros():
    metric = Numbers()
    metric.update(torch.tensor([True, False, True]))
    metric.update(each > 1 for each in range(3))
    assert float(metric.compute()) == 0.5


def test_sums_keep_what_single_precision_would_lose():
    metric = Numbers()
    for _ in range(3):
        metric.update([2.0**25, 1.0])
    assert float(metric.total) == 3 * (2**25 + 1)


def test_parts_of_several_processes_are_added():
    one, other = Numbers(), Numbers()
    one.update([1.0])
    other.update([0.0, 0.0])
    one.merge_state(other)
    assert float(one.compute()) == pytest.approx(1 / 3)
