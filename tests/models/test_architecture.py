"""Structure discovery: two tiny models, other families by structure alone, and refusals that say what to do."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from cakeflow import Architecture, Contexts
from cakeflow.errors import ArchitectureError, ConfigError, EditError
from cakeflow.forward.suffix import cut
from cakeflow.forward.tokens import encode_batch
from cakeflow.models.architecture import Site, find_architecture, is_transposed
from cakeflow.models.hooks import inject
from cakeflow.models.language import LanguageModel
from cakeflow.models.loading import load_model

WIDTH = 16
COMMON = {"vocab_size": 64, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
BLOCK = "transformer.h.{}"
GATED = {"intermediate_size": 40, "num_key_value_heads": 1}
LLAMA_LIKE = ("model.layers.{}", "mlp.down_proj", "self_attn.o_proj")
FAMILIES = {
    "qwen2": (GATED, *LLAMA_LIKE),
    "mistral": (GATED, *LLAMA_LIKE),
    "olmo2": (GATED, *LLAMA_LIKE),
    "gemma2": ({**GATED, "head_dim": 8}, *LLAMA_LIKE),
    "gpt_neox": ({"intermediate_size": 40}, "gpt_neox.layers.{}", "mlp.dense_4h_to_h", "attention.dense"),
    "gptj": ({"n_inner": 40, "rotary_dim": 4}, "transformer.h.{}", "mlp.fc_out", "attn.out_proj"),
    "opt": ({"ffn_dim": 40, "word_embed_proj_dim": WIDTH}, "model.decoder.layers.{}", "fc2", "self_attn.out_proj"),
    "phi": ({"intermediate_size": 40}, "model.layers.{}", "mlp.fc2", "self_attn.dense"),
}
"""Family -> config, block, MLP output and attention output, written down from each family's own source."""


def build(family, **changes):
    torch.manual_seed(0)
    extra = FAMILIES[family][0] if family in FAMILIES else {}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**COMMON, **extra, **changes}))


def test_the_tiny_models(tiny):
    paths = {
        "gpt2": ("transformer.h.{}", "mlp.c_proj", "attn.c_proj", "transformer.ln_f"),
        "llama": ("model.layers.{}", "mlp.down_proj", "self_attn.o_proj", "model.norm"),
    }
    block, mlp_out, attn_out, norm = paths[tiny.model.config.model_type]
    expected = Architecture(block, f"{block}.{mlp_out}", f"{block}.{attn_out}", norm, "lm_head")
    assert tiny.architecture == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_by_structure(family):
    _, block, mlp_out, attn_out = FAMILIES[family]
    model = build(family)
    result = find_architecture(model)
    assert (result.block, result.mlp_out, result.attn_out) == (block, f"{block}.{mlp_out}", f"{block}.{attn_out}")
    assert model.get_submodule(result.head) is model.get_output_embeddings()
    assert "norm" in type(model.get_submodule(result.final_norm)).__name__.lower()


@pytest.mark.parametrize(
    ("family", "inner", "expected"),
    [("gpt2", "n_inner", "mlp.c_proj"), ("qwen2", "intermediate_size", "mlp.down_proj"), ("gptj", "n_inner", "fc_out")],
)
def test_square_weights_do_not_mislead(family, inner, expected):
    """With an MLP as wide as the residual stream, nothing can be told from shapes."""
    assert find_architecture(build(family, **{inner: WIDTH})).mlp_out.endswith(expected)


def test_orientation_goes_by_class(lm):
    square = Conv1D(8, 8), nn.Linear(8, 8)
    assert [is_transposed(module) for module in square] == [True, False]
    assert lm.weight(Site(1, "mlp_out")).shape == (192, 48)
    assert lm.oriented(Site(1, "mlp_out")).shape == (48, 192)
    keys = torch.randn(5, 192, dtype=torch.float64)
    module = lm.module(Site(1, "mlp_out"))
    torch.testing.assert_close(module(keys).detach() - module.bias.detach(), keys @ lm.oriented(Site(1, "mlp_out")).T)


def test_oriented_square_conv1d_is_transposed(lm):
    model = build("gpt2", n_inner=WIDTH)
    square = LanguageModel.wrap(model, lm.tokenizer)
    assert torch.equal(square.oriented(Site(0, "mlp_out")), square.weight(Site(0, "mlp_out")).detach().T)


def test_linear_is_not_transposed(lm):
    square = LanguageModel.wrap(build("qwen2", intermediate_size=WIDTH), lm.tokenizer)
    assert torch.equal(square.oriented(Site(0, "mlp_out")), square.weight(Site(0, "mlp_out")).detach())


def renamed(model, change):
    """The same model with a part of its tree made unrecognisable."""
    model = copy.deepcopy(model)
    change(model)
    return model


def hide_attention(model):
    for block in model.transformer.h:
        block.attn = nn.Sequential(block.attn)


BROKEN = {
    "block": lambda model: setattr(model.config, "n_layer", 5),
    "attn_out": hide_attention,
    "head": lambda model: setattr(model, "get_output_embeddings", lambda: None),
    "mlp_out": lambda model: setattr(model.config, "n_embd", 47),
}


@pytest.mark.parametrize("part", BROKEN)
def test_an_unknown_structure_names_the_part_and_the_remedy(lm, part):
    with pytest.raises(ArchitectureError) as caught:
        find_architecture(renamed(lm.model, BROKEN[part]))
    message = str(caught.value)
    assert "GPT2LMHeadModel" in message
    assert "could not find" in message
    assert "architecture=Architecture(block=" in message
    if part != "mlp_out":  # a wrong width already fails at the attention's projection
        assert f"could not find {part}" in message
    assert isinstance(caught.value, EditError)


def test_a_model_without_a_final_norm(lm):
    model = renamed(lm.model, hide_final_norm)
    assert find_architecture(model) == dataclasses.replace(lm.architecture, final_norm="")


def test_an_architecture_given_by_hand_wins(lm):
    by_hand = Architecture(
        "transformer.h.{}", "transformer.h.{}.mlp.c_fc", "transformer.h.{}.attn.c_proj", "x", "lm_head"
    )
    wrapped = LanguageModel.wrap(renamed(lm.model, hide_final_norm), lm.tokenizer, by_hand)
    assert wrapped.module(Site(2, "mlp_out")) is wrapped.model.transformer.h[2].mlp.c_fc
    assert wrapped.architecture is by_hand


def hide_final_norm(model):
    model.transformer.ln_f = nn.Identity()


def test_an_architecture_by_hand_with_a_wrong_path_is_refused_at_once(lm):
    wrong = Architecture(
        "transformer.h.{}", "transformer.h.{}.mlp.nothing", "transformer.h.{}.attn.c_proj", "x", "lm_head"
    )
    with pytest.raises(ArchitectureError, match=r"no module 'transformer\.h\.0\.mlp\.nothing' in GPT2LMHeadModel"):
        LanguageModel.wrap(lm.model, lm.tokenizer, wrong)


def test_quantized_weights_are_refused(lm):
    module = lm.module(Site(1, "mlp_out"))
    del module.weight
    module.register_buffer("weight", torch.zeros(3, 3, dtype=torch.int8))
    with pytest.raises(ArchitectureError, match=r"\.1\.\S*: Conv1D .*dequantized"):
        lm.weight(Site(1, "mlp_out"))


def test_slow_tokenizers_and_mask_free_attention_are_refused(lm):
    class Slow:
        is_fast = False

    with pytest.raises(ArchitectureError, match="fast tokenizer"):
        LanguageModel.wrap(lm.model, Slow())
    lm.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ArchitectureError, match="attn_implementation='sdpa'"):
        LanguageModel.wrap(lm.model, lm.tokenizer)


def test_a_model_that_does_not_load_says_what_was_tried(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"neither an embedded name \(smollm2-135m\), a folder"):
        load_model(tmp_path)


def test_fingerprint_sees_weights_up_to_a_layer_tokenizer_and_nothing_above(lm):
    everything, below = lm.fingerprint(), lm.fingerprint(3)
    with torch.no_grad():
        lm.weight(Site(4, "mlp_out"))[0, 0] += 1
    assert lm.fingerprint(3) == below
    assert lm.fingerprint() != everything
    with torch.no_grad():
        lm.weight(Site(2, "mlp_out"))[0, 0] += 1
    assert lm.fingerprint(3) != below
    again = lm.fingerprint(3)
    lm.tokenizer.add_tokens(["zzz"])
    assert lm.fingerprint(3) != again


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox", "opt", "mistral"])
def test_other_families_suffixes_equal_full_passes(family, lm, requests):
    """The suffix pass relies on masks, positions and cache as each family handles them."""
    wrapped = LanguageModel.wrap(build(family, vocab_size=600).double().eval(), lm.tokenizer)
    batch = encode_batch(wrapped, requests[:4], Contexts.of(["{}", "I am. {}"]))
    rows = [row for variants in batch.rows for row in variants]
    site = Site(0)
    groups, _ = cut(wrapped, rows, range(len(rows)), [site], 64)
    delta = torch.randn(len(rows), WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for group in groups:
        got = group.logits(wrapped, [site], delta[group.fact, None])
        for line, row, column in zip(got, group.row.tolist(), group.column.tolist(), strict=True):
            fact = int(group.fact[row])
            full = torch.tensor([rows[fact].ids[:-1]])
            with torch.no_grad(), inject(wrapped, site, delta[fact : fact + 1], torch.tensor([rows[fact].subject])):
                expected = wrapped.model(input_ids=full, use_cache=False).logits[0, rows[fact].subject + column]
            torch.testing.assert_close(line, expected, rtol=0, atol=1e-5)
