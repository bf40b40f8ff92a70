"""What edits add to a weight, and what it was."""

import copy

import pytest
import torch

from cakeflow import Update
from cakeflow.journal.weights import EditedWeights
from cakeflow.storage.hashing import tensor_hash


def draw(lm, layer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    d_out, d_in = lm.oriented(layer).shape
    return Update(
        torch.randn(2, d_in, generator=generator).double(), torch.randn(2, d_out, generator=generator).double()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_add_restore_and_forget(tiny, dtype):
    tiny.model.to(dtype)
    before, weights = copy.deepcopy(tiny), EditedWeights(tiny)
    assert torch.equal(weights.origin(2), tiny.oriented(2))
    weights.add(2, draw(tiny, 2))
    wanted = before.oriented(2).double() + draw(tiny, 2).dense
    tolerance = {"rtol": 0, "atol": 1e-12} if dtype == torch.float64 else {}
    torch.testing.assert_close(tiny.oriented(2), wanted.to(dtype), **tolerance)
    torch.testing.assert_close(weights.collected(2).double(), wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(weights.origin(2), before.oriented(2))
    assert weights.hash(2) == tensor_hash(tiny.weight(2)) != tensor_hash(before.weight(2))
    with weights.reverted():
        assert torch.equal(tiny.weight(2), before.weight(2))
    weights.restore(2)
    weights.restore(1)
    assert torch.equal(tiny.weight(2), before.weight(2))
    weights.forget(2)
    assert weights.originals == {}
