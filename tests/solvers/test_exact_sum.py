"""Exact sums: the same bits in any order and grouping, within a rounding of rational arithmetic, or an error."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cakeflow.errors import NumericalError
from cakeflow.solvers import ExactSum
from cakeflow.solvers.exact_sum import HIGH, LIMIT, LOW, MOST_TERMS, STRIP

UNIT = Fraction(1, 2 ** (HIGH + LOW))


def terms(seed, count=9, width=7, dtype=torch.float32, spread=8.0):
    """Outer products whose entries have very different sizes."""
    noise = torch.Generator().manual_seed(seed)
    keys = torch.randn(count, 5, width, generator=noise, dtype=torch.float64)
    keys = keys * 10 ** (spread * (torch.rand(count, 1, width, generator=noise, dtype=torch.float64) - 0.5))
    return [(k.T @ k).to(dtype) for k in keys]


def sum_of(matrices):
    total = ExactSum.zeros(len(matrices[0]))
    for matrix in matrices:
        total.add(matrix)
    return total


@given(st.integers(0, 2**32), st.permutations(range(9)), st.integers(0, 9), st.integers(0, 9))
@settings(max_examples=40)
def test_any_order_and_grouping_gives_the_same_words(seed, order, low, high):
    matrices = terms(seed)
    low, high = sorted((low, high))
    shuffled = [matrices[i] for i in order]
    groups = [group for group in (shuffled[high:], shuffled[:low], shuffled[low:high]) if group]
    total = ExactSum.zeros(7)
    for group in groups:
        total.join(sum_of(group))
    assert torch.equal(total.words, sum_of(matrices).words)
    assert total.count == 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_term_is_rounded_once(dtype):
    matrices = terms(1, dtype=dtype)
    total, value = sum_of(matrices), sum_of(matrices).value()
    for i in range(7):
        for j in range(i, 7):
            exact = sum(Fraction(float(matrix[i, j])) for matrix in matrices)
            words = Fraction(int(total.words[i, j]), 2**HIGH) + int(total.words[j + 1, i]) * UNIT
            assert abs(words - exact) <= len(matrices) * UNIT / 2
            assert abs(Fraction(float(value[i, j])) - words) <= abs(words) / 2**52
            assert value[i, j] == value[j, i]


def test_a_float32_term_keeps_every_bit():
    term = torch.full((3, 3), 3e-11)
    assert torch.equal(sum_of([term] * 5).value(), 5 * term.double())


@pytest.mark.parametrize("width", [1, STRIP - 1, STRIP, STRIP + 1, 3 * STRIP + 5])
def test_a_sum_has_float64_precision_at_any_width(width):
    matrices = terms(2, width=width, dtype=torch.float64, spread=0.0)
    total = sum_of(matrices)
    torch.testing.assert_close(total.value(), torch.stack(matrices).sum(0), rtol=2e-15, atol=1e-14)
    assert total.words.shape == (width + 1, width)
    assert len(total) == width


def test_a_massive_activation_takes_no_bits_from_other_entries():
    small = terms(3, dtype=torch.float64, spread=0.0)
    massive = torch.zeros(7, 7, dtype=torch.float64)
    massive[0, 0] = 1e12
    plain, other = sum_of(small).value(), sum_of([massive, *small]).value()
    assert torch.equal(plain[1:, 1:], other[1:, 1:])
    assert abs(float(other[0, 0]) - 1e12 - float(plain[0, 0])) < 1e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_and_changes_nothing(bad):
    total = sum_of(terms(4))
    before = total.words.clone()
    term = terms(5)[0]
    term[2, 2] = bad
    with pytest.raises(NumericalError, match="is not finite"):
        total.add(term)
    assert torch.equal(total.words, before)
    assert total.count == 9


def test_a_sum_that_would_be_too_large_is_refused():
    limit = LIMIT / 2**HIGH
    with pytest.raises(NumericalError, match=r"has a sum of squares of 1\.1e\+15, and the limit is 1\.1e\+15"):
        sum_of([torch.full((2, 2), limit)])
    almost = torch.full((2, 2), 0.75 * limit, dtype=torch.float64)
    with pytest.raises(NumericalError, match=r"has a sum of squares of 1\.7e\+15"):
        sum_of([almost, almost])
    total = sum_of([almost])
    with pytest.raises(NumericalError, match=r"has a sum of squares of 1\.7e\+15"):
        total.join(sum_of([almost]))


def test_there_is_room_for_so_many_terms_and_no_more():
    full = ExactSum(torch.zeros(3, 2, dtype=torch.int64), MOST_TERMS)
    with pytest.raises(NumericalError, match=f"{MOST_TERMS + 1} blocks, and has room for {MOST_TERMS}"):
        full.add(torch.eye(2))
    with pytest.raises(NumericalError, match=f"{2 * MOST_TERMS} blocks"):
        full.join(full)
    assert MOST_TERMS * 2 ** (LOW - 1) < 2**63  # so many roundings of the first word fit the second
