"""Retention against its definition, however it is fed."""

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cakeflow.metrics.retention import Retention

edits = st.lists(st.tuples(st.floats(0, 1, width=32), st.integers(0, 3)), min_size=1, max_size=20)


@given(edits, st.integers(0, 20))
def test_parts_and_definition(rows, cut):
    metric, other = Retention(), Retention()
    for each, part in ((metric, rows[:cut]), (other, rows[cut:])):
        success, batch = [value for value, _ in part], [number for _, number in part]
        each.update(torch.tensor(success), torch.tensor(batch, dtype=torch.long))
    metric.merge_state(other)
    assert float(metric.compute()) == pytest.approx(sum(value for value, _ in rows) / len(rows), abs=1e-6)
    for number, mean in enumerate(metric.by_batch().tolist()):
        mine = [value for value, batch in rows if batch == number]
        assert mean == pytest.approx(sum(mine) / len(mine), abs=1e-6) if mine else mean != mean


def test_nothing_is_nan_and_it_plots():
    metric = Retention()
    metric.update(torch.empty(0), torch.empty(0, dtype=torch.long))
    assert metric.compute().isnan()
    metric.update(torch.tensor([1.0]), torch.tensor([0]))
    figure, axes = metric.plot()
    assert axes.get_ylim()[1] >= 1
    plt.close(figure)
