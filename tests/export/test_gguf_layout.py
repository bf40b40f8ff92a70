"""Names and orders of rows in GGUF files."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cakeflow.errors import ExportError
from cakeflow.export.gguf_layout import architecture_code, in_pairs, measured_layout, tensor_name


@given(heads=st.integers(1, 5), half=st.integers(1, 4), width=st.integers(1, 3))
def test_row_2i_and_2i_plus_1_are_the_halves(heads, half, width):
    rows = torch.randn(heads * 2 * half, width)
    paired = in_pairs(rows, heads)
    for head in range(heads):
        for i in range(half):
            start = head * 2 * half
            assert torch.equal(paired[start + 2 * i], rows[start + i])
            assert torch.equal(paired[start + 2 * i + 1], rows[start + half + i])


def test_a_layout_is_measured(tiny):
    lm = tiny
    heads = lm.config.num_attention_heads
    rows = torch.randn(heads * 4, 3)
    assert measured_layout(lm, rows, rows)(rows) is rows
    assert torch.equal(measured_layout(lm, rows, in_pairs(rows, heads))(rows), in_pairs(rows, heads))
    assert measured_layout(lm, rows, rows + 1) is None
    assert measured_layout(lm, rows, rows[:2]) is None


def test_names():
    assert tensor_name("llama", 2, "model.embed_tokens.weight") == "token_embd.weight"
    assert tensor_name("qwen2", 2, "model.layers.0.self_attn.q_proj.bias") == "blk.0.attn_q.bias"
    assert tensor_name("llama", 2, "model.strange.weight") is None
    with pytest.raises(ExportError, match="no architecture 'dreams'"):
        architecture_code("dreams")
