"""Decoders whose blocks differ, have recurrent layers or experts, or lie beside an image encoder."""

import pytest
import torch
from conftest import COMMON_BEGINNING, alone, fit_tiny, random_model, tokens_alone
from transformers import AutoModelForImageTextToText, Gemma3Config, Qwen2VLConfig, T5Config, T5ForConditionalGeneration

from cakeflow import Architecture, Contexts, EditRequest, GradientSearch, LeastSquares, LocateThenEdit
from cakeflow.errors import ArchitectureError
from cakeflow.evaluation.scoring import score_targets
from cakeflow.forward.generation import continuations
from cakeflow.forward.suffix import cut
from cakeflow.forward.tokens import encode_batch
from cakeflow.models import Site
from cakeflow.models.hooks import inject
from cakeflow.models.language import LanguageModel

COMMON = {
    "vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.1, "init_std": 0.1, "tie_word_embeddings": False,
}  # fmt: skip
GATED = {"intermediate_size": 48, "num_key_value_heads": 2}
SSM = {**GATED, "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
DELTA = {**GATED, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
         "linear_value_head_dim": 8}  # fmt: skip
EXPERTS = {**GATED, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
          "head_dim": 8, "num_key_value_heads": 4}  # fmt: skip
ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1}
BLOCK = "model.layers.{}"
TREES = {
    "falcon_h1": ({**SSM, "head_dim": 8, "mamba_d_ssm": 64}, "feed_forward.down_proj", "self_attn.o_proj"),
    "bamba": ({**SSM, "attn_layer_indices": [1, 3]}, "feed_forward.down_proj", "self_attn.o_proj"),
    "jamba": (
        {**GATED, "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 3, "expert_layer_period": 4,
         "num_experts": 4, "mamba_d_state": 8, "use_mamba_kernels": False},
        "feed_forward.down_proj", "self_attn.o_proj",
    ),
    "qwen3_next": ({**DELTA, **EXPERTS, "mlp_only_layers": [1, 2]}, "mlp.down_proj", "self_attn.o_proj"),
    "lfm2": ({**GATED, "full_attn_idxs": [1, 3]}, "feed_forward.w2", "self_attn.out_proj"),
    "recurrent_gemma": ({**GATED, "head_dim": 8, "lru_width": 32}, "mlp_block.down_proj", "temporal_block.o_proj"),
    "deepseek_v3": ({**EXPERTS, **LATENT, **ROUTED, "first_k_dense_replace": 3}, "mlp.down_proj", "self_attn.o_proj"),
    "afmoe": ({**EXPERTS, "head_dim": 8, "num_dense_layers": 3}, "mlp.down_proj", "self_attn.o_proj"),
    "qwen2_moe": (
        {**EXPERTS, "shared_expert_intermediate_size": 24}, "mlp.shared_expert.down_proj", "self_attn.o_proj",
    ),
    "gemma4_text": (
        {**GATED, "head_dim": 8, "vocab_size_per_layer_input": 600, "hidden_size_per_layer_input": 8,
         "num_kv_shared_layers": 0},
        "mlp.down_proj", "self_attn.o_proj",
    ),
}  # fmt: skip
"""Family -> config, MLP output and attention output, written down from each family's own source."""
RECURRENT = {"falcon_h1", "bamba", "jamba", "qwen3_next", "lfm2", "recurrent_gemma"}
LAYER = 2
FACTS = [EditRequest("Here comes {}", "Ann", "Rome"), EditRequest("A friend of {}", "Bob", "sea")]
PARTS = {
    "solver": LeastSquares(), "targets": GradientSearch(steps=30, lr=0.2, clamp=30.0, essence=None, decay=None),
    "max_relative_update": 1e3,
}  # fmt: skip


def opt_350m(tokenizer):
    """Norms behind attention and MLP, none at the end, and embeddings of another width."""
    return random_model("opt", tokenizer, **COMMON, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False)


def gemma3(tokenizer):
    """A text part beside an image encoder that has as many blocks."""
    torch.manual_seed(0)
    text = {name: value for name, value in {**COMMON, **GATED, "head_dim": 8}.items() if name != "init_std"}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return LanguageModel.wrap(AutoModelForImageTextToText.from_config(config).float().eval(), tokenizer)


def qwen2_vl(tokenizer):
    """A text part that shifts the positions behind images, row by row."""
    torch.manual_seed(0)
    text = {
        **COMMON,
        **GATED,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }
    vision = {"embed_dim": 16, "hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
    config = Qwen2VLConfig(text_config={k: v for k, v in text.items() if k != "init_std"}, vision_config=vision)
    return LanguageModel.wrap(AutoModelForImageTextToText.from_config(config).float().eval(), tokenizer)


def gpt(tokenizer):
    """Blocks that return lists, and take two-dimensional masks only."""
    return random_model("openai-gpt", tokenizer, **COMMON)


BUILT = {"opt-350m": opt_350m, "gemma3": gemma3, "qwen2_vl": qwen2_vl, "gpt": gpt}


@pytest.fixture(params=[*TREES, *BUILT])
def family(request, lm):
    if request.param in BUILT:
        return BUILT[request.param](lm.tokenizer)
    return random_model(request.param, lm.tokenizer, **{**COMMON, **TREES[request.param][0]})


@pytest.mark.parametrize("name", TREES)
def test_projections_by_structure(name, lm):
    config, mlp_out, attn_out = TREES[name]
    architecture = random_model(name, lm.tokenizer, **{**COMMON, **config}).architecture
    assert (architecture.block, architecture.mlp_out) == (BLOCK, f"{BLOCK}.{mlp_out}")
    assert architecture.attn_out == f"{BLOCK}.{attn_out}"


def test_the_text_part_is_found_beside_an_image_encoder(lm):
    block = "model.language_model.layers.{}"
    assert gemma3(lm.tokenizer).architecture == Architecture(
        block, f"{block}.mlp.down_proj", f"{block}.self_attn.o_proj", "model.language_model.norm", "lm_head"
    )


def test_a_post_norm_decoder_has_no_final_norm(lm):
    assert opt_350m(lm.tokenizer).architecture.final_norm == ""


def test_texts_that_end_one_after_the_other_are_what_the_model_says_alone(family):
    prompts = ["Here comes Ann", "A friend of Bob", "The old sea is", "Lund", *COMMON_BEGINNING]
    whole = [tokens_alone(family, prompt, 16) for prompt in prompts]
    end = family.model.generation_config.eos_token_id = [whole[0][6], whole[2][11]]
    texts = [alone(family, prompt, 16, end) for prompt in prompts]
    assert continuations(family, prompts, 16) == texts


def test_suffixes_equal_full_passes(family, requests):
    """Whatever carries a state from token to token, or takes no explicit mask, runs whole rows."""
    kind = family.model.config.model_type
    assert family.places_tokens == (kind not in RECURRENT | {"openai-gpt"})
    batch = encode_batch(family, requests[:2], Contexts.of(["{}", "I am. {}"]))
    rows = [row for variants in batch.rows for row in variants]
    site = Site(1)
    groups, _ = cut(family, rows, range(len(rows)), [site], 64)
    delta = torch.randn(len(rows), 32, generator=torch.Generator().manual_seed(0))
    for group in groups:
        got = group.logits(family, [site], delta[group.fact, None])
        places = zip(got, group.row.tolist(), group.column.tolist(), strict=True)
        for line, row, column in places:
            fact = int(group.fact[row])
            start = rows[fact].subject if family.places_tokens else 0
            full = torch.tensor([rows[fact].ids[:-1]])
            with torch.no_grad(), inject(family, site, delta[fact : fact + 1], torch.tensor([rows[fact].subject])):
                expected = family.model(input_ids=full, use_cache=False).logits[0, start + column]
            torch.testing.assert_close(line, expected, rtol=0, atol=1e-4)


def chances(lm):
    return score_targets(lm, [r.text for r in FACTS], [r.target_new for r in FACTS])[0]


def test_an_edit_raises_the_targets_and_is_taken_back(family, quiet):
    if family.model.config.model_type == "gemma4_text":  # norms, a factor and a gate of the layer's own
        with pytest.raises(ArchitectureError, match=r"neither by a factor nor by one norm.*targets\.site: mlp_out"):
            fit_tiny(family, [LAYER], FACTS, quiet, 1e-9, **PARTS)
        return
    with torch.no_grad():
        family.head.weight.mul_(8)  # otherwise no token gets more than a few per cent
    before = {name: tensor.clone() for name, tensor in family.model.state_dict().items()}
    low = chances(family)
    module = fit_tiny(family, [LAYER], FACTS, quiet, 1e-9, **PARTS)
    assert module.journal[0].numbers["target/arrived"] > 0.95
    assert bool((chances(family) > low + 0.3).all())
    changed = {name for name, tensor in family.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {family.weight_name(Site(LAYER, "mlp_out"))}
    module.journal.rollback()
    assert all(torch.equal(tensor, before[name]) for name, tensor in family.model.state_dict().items())


MIXTURES = {"mixtral": {"num_local_experts": 4}, "qwen3_moe": EXPERTS, "gpt_oss": {"num_local_experts": 4}}


@pytest.mark.parametrize("name", MIXTURES)
def test_a_model_of_routed_experts_alone_is_refused_with_the_reason(name, lm):
    with pytest.raises(ArchitectureError, match=r"mlp\.experts is a mixture of experts: the router sends"):
        random_model(name, lm.tokenizer, **{**COMMON, **GATED, "head_dim": 8, **MIXTURES[name]})


def test_a_layer_of_experts_is_refused_and_its_shared_expert_named_and_edited(lm, quiet):
    mixed = random_model("deepseek_v3", lm.tokenizer, **{**COMMON, **TREES["deepseek_v3"][0]})
    site = "mlp.shared_experts.down_proj"
    with pytest.raises(ArchitectureError, match=rf"3\.mlp\.down_proj.*mixture of experts.*site='{site}'.*dense MLP"):
        LocateThenEdit(mixed, [2, 3])
    weight = f"model.layers.3.{site}.weight"
    before = mixed.weight(weight).clone()
    fit_tiny(mixed, [3], FACTS, quiet, 1e-9, site=site, **PARTS)
    assert not torch.equal(mixed.weight(weight), before)


def test_experts_in_a_list_are_recognized(lm):
    for block in lm.model.transformer.h:
        block.mlp = torch.nn.ModuleDict({"experts": torch.nn.ModuleList([torch.nn.Linear(40, 48) for _ in range(2)])})
    with pytest.raises(ArchitectureError, match="mixture of experts"):
        LanguageModel.wrap(lm.model, lm.tokenizer)


def test_tokens_that_are_mixed_before_the_projection_are_no_mlp(lm):
    with pytest.raises(ArchitectureError, match="could not find mlp_out"):
        random_model("rwkv", lm.tokenizer, **COMMON, attention_hidden_size=32)


def test_an_encoder_and_decoder_is_refused(lm):
    model = T5ForConditionalGeneration(T5Config(vocab_size=600, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4))
    with pytest.raises(ArchitectureError, match="this model has an encoder too"):
        LanguageModel.wrap(model, lm.tokenizer)
