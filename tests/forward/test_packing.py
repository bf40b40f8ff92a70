"""Rows in groups: every row once, within the budget, with little padding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cakeflow.forward.packing import GIB, pad, plan


def test_pad_puts_zeros_on_the_right():
    assert torch.equal(pad([[5], [1, 2, 3], [7, 8]]), torch.tensor([[5, 0, 0], [1, 2, 3], [7, 8, 0]]))


LENGTHS = st.lists(st.integers(1, 60), max_size=40)


@given(LENGTHS, st.integers(1, 200), st.integers(0, 40))
def test_plan(lengths, max_tokens, slack):
    """Every row exactly once, longest first; a group keeps the budget (or is a single row) and the padding."""
    groups = plan(lengths, max_tokens, slack)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    order = [lengths[index] for group in groups for index in group]
    assert order == sorted(order, reverse=True)
    for group in groups:
        longest = max(lengths[index] for index in group)
        assert lengths[group[0]] == longest
        assert len(group) == 1 or len(group) * longest <= max_tokens
        assert sum(longest - lengths[index] for index in group) <= slack


@given(LENGTHS.filter(bool))
def test_plan_wastes_no_group(lengths):
    """Rows of one length share a group as far as the budget goes, and room for all means one group."""
    assert len(plan(lengths, max_tokens=10**6, slack=10**6)) == 1
    assert len(plan([lengths[0]] * 10, max_tokens=3 * lengths[0], slack=0)) == 4
    assert len(plan(lengths, max_tokens=10**6, slack=0)) == len(set(lengths))


def test_a_row_longer_than_the_budget_is_alone():
    assert plan([9, 3, 3], max_tokens=6) == [[0], [1, 2]]
    assert plan([], max_tokens=6) == []


def test_rows_of_one_length_keep_their_order():
    assert plan([4, 4, 4], max_tokens=8) == [[0, 1], [2]]


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_pad_on_a_device(device):
    assert pad([[1]], device).dtype == torch.long


def test_a_gibibyte():
    assert GIB == 1024**3
