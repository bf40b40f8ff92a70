"""Overlap and divergence of next-token distributions, against sets and sums."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cakeflow.errors import ConfigError
from cakeflow.metrics.distribution import TOPS, TopOverlap, prediction_shift, top_overlap


def pair(seed, rows=4, size=12):
    draws = torch.randn(2, rows, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return draws.log_softmax(-1)


@given(st.integers(0, 999), st.integers(1, 12))
def test_the_overlap_is_that_of_sets(seed, k):
    p, q = pair(seed)
    sets = [[set(row.argsort(descending=True)[:k].tolist()) for row in each] for each in (p, q)]
    expected = [len(one & other) / k for one, other in zip(*sets, strict=True)]
    assert top_overlap(p, q, k).tolist() == pytest.approx(expected)
    assert top_overlap(q, p, k).tolist() == pytest.approx(expected)
    assert top_overlap(p, p, k).tolist() == [1.0] * 4


@given(st.integers(0, 999), st.integers(1, 3))
def test_parts_give_the_mean_of_the_whole(seed, cut):
    p, q = pair(seed)
    parts, whole = TopOverlap(3), TopOverlap(3)
    whole.update(p, q)
    for part in (slice(0, cut), slice(cut, 4)):
        parts.update(p[part], q[part])
    assert float(parts.compute()) == pytest.approx(float(whole.compute()))
    assert float(whole.compute()) == pytest.approx(float(top_overlap(p, q, 3).mean()))


def test_states_of_two_processes_merge():
    p, q = pair(5)
    first, second = TopOverlap(2), TopOverlap(2)
    first.update(p[:1], q[:1])
    second.update(p[1:], q[1:])
    first.merge_state(second)
    assert float(first.compute()) == pytest.approx(float(top_overlap(p, q, 2).mean()))


def test_all_at_once():
    p, q = pair(7)
    shift = prediction_shift()
    shift.update(p, q)
    values = shift.compute()
    assert set(values) == {"kl", *(f"top{k}" for k in TOPS)}
    assert float(values["kl"]) == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-5)
    assert float(values["top5"]) == pytest.approx(float(top_overlap(p, q, 5).mean()))


@pytest.mark.parametrize("k", [0, 13])
def test_more_tokens_than_there_are(k):
    with pytest.raises(ConfigError, match=f"between 1 and the 12 tokens of the vocabulary, got {k}"):
        top_overlap(*pair(0), k)
