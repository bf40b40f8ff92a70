"""Joins of changes: exact where they must be, whatever the tensors."""

import pytest
import torch
from cakeflow_sidememory import join
from cakeflow_sidememory.joins import trim
from hypothesis import given
from hypothesis import strategies as st

from cakeflow.errors import ConfigError

SHAPE = (6, 5)


def weights(seed, count=1):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64))


@given(st.integers(0, 10**6), st.integers(1, 4), st.floats(0.05, 1.0))
def test_equal_memories_are_that_memory_trimmed(seed, count, density):
    base, memory = weights(seed, 2)
    joined = join(base, [memory] * count, [1 / count] * count, "ties", density)
    torch.testing.assert_close(joined, base + trim(memory - base, density), rtol=0, atol=1e-14)


@given(st.integers(0, 10**6), st.integers(2, 4))
def test_disjoint_changes_are_all_kept(seed, count):
    base, *changes = weights(seed, count + 1)
    owner = torch.randint(count, SHAPE, generator=torch.Generator().manual_seed(seed))
    parts = [change * (owner == number) for number, change in enumerate(changes)]
    joined = join(base, [base + part for part in parts], [1 / count] * count, "ties", 1.0)
    torch.testing.assert_close(joined, base + torch.stack(parts).sum(0), rtol=0, atol=1e-14)


@given(st.integers(0, 10**6), st.sampled_from(["ties", "sign", "magnitude", "magnitude_norm"]))
def test_one_memory_untrimmed_is_itself(seed, how):
    base, memory = weights(seed, 2)
    torch.testing.assert_close(join(base, [memory], [1.0], how, 1.0), memory, rtol=0, atol=1e-14)


@given(st.integers(0, 10**6))
def test_the_sign_is_elected_entry_by_entry(seed):
    """Against the definition, entry by entry."""
    base, *memories = weights(seed, 4)
    shares = [0.2, 0.3, 0.5]
    joined = join(base, memories, shares, "sign")
    for place in torch.cartesian_prod(*map(torch.arange, SHAPE)).tolist():
        values = [float((memory - base)[tuple(place)]) for memory in memories]
        total = sum(share * value for share, value in zip(shares, values, strict=True))
        agree = [(share, value) for share, value in zip(shares, values, strict=True) if (value > 0) == (total >= 0)]
        mean = sum(share * value for share, value in agree) / sum(share for share, _ in agree)
        assert float((joined - base)[tuple(place)]) == pytest.approx(mean, abs=1e-12)


def test_trimming_keeps_the_first_of_equal_entries():
    change = torch.tensor([[1.0, -1.0, 1.0, 0.5]])
    assert trim(change, 0.5).tolist() == [[1.0, -1.0, 0.0, 0.0]]


@pytest.mark.parametrize(("memories", "shares", "density"), [([], [], 0.5), ([1], [1, 2], 0.5), ([1], [1], 0.0)])
def test_what_cannot_be_joined(memories, shares, density):
    base = torch.zeros(SHAPE)
    with pytest.raises(ConfigError, match=f"{len(memories)} memories with {len(shares)} weights and density={density}"):
        join(base, [base + 1 for _ in memories], shares, "ties", density)
