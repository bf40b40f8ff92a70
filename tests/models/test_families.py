"""Every supported model family, as a tiny random model built offline: structure, hooks, one edit, and its undoing."""

from dataclasses import replace

import pytest
import torch
from conftest import COMMON_BEGINNING, alone, fit_tiny, random_model

from cakeflow import Contexts, EditRequest, GradientSearch, LeastSquares
from cakeflow.allocators import Jacobian
from cakeflow.evaluation.scoring import score_targets
from cakeflow.forward.generation import continuations
from cakeflow.forward.keys import FactReader
from cakeflow.forward.tokens import encode_batch
from cakeflow.models.architecture import Site, is_transposed
from cakeflow.models.hooks import capture, inject

COMMON = {
    "vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.1, "init_std": 0.1,
}  # fmt: skip
GATED = {"intermediate_size": 48, "num_key_value_heads": 2}
HEADS = {**GATED, "head_dim": 8}
LATENT = {"intermediate_size": 48, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4}
FAMILIES = {
    "llama": GATED, "mistral": GATED, "qwen2": GATED, "qwen3": HEADS, "phi3": GATED, "gemma": HEADS, "gemma2": HEADS,
    "smollm3": GATED, "gpt2": {"n_inner": 48}, "gptj": {"n_inner": 48, "rotary_dim": 4},
    "gpt_neox": {"intermediate_size": 48},
    "gpt_neox, sequential": {"intermediate_size": 48, "use_parallel_residual": False},
    "phi": {"intermediate_size": 48}, "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "bloom": {},
    "falcon": {}, "falcon, new": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon, alibi": {"alibi": True, "parallel_attn": False}, "olmo2": GATED, "stablelm": GATED,
    "granite": {**GATED, "residual_multiplier": 0.22}, "minicpm3": LATENT, "gemma3_text": HEADS, "glm4": HEADS,
    "olmo3": GATED, "exaone4": GATED, "cohere": GATED,
}  # fmt: skip
LAYERS = [1, 2]
FACTS = [EditRequest("Here comes {}", "Ann", "Rome"), EditRequest("A friend of {}", "Bob", "sea")]
"""Their subjects end the prompts, so that even a random model's prediction depends on them."""


@pytest.fixture(params=FAMILIES)
def family(request, lm):
    return random_model(request.param.split(",")[0], lm.tokenizer, **{**COMMON, **FAMILIES[request.param]})


def test_texts_with_a_common_beginning_are_what_the_model_says_alone(family):
    """However the family places tokens: what is run once, and texts that end early, change none of them."""
    texts = [alone(family, prompt, 20, [0]) for prompt in COMMON_BEGINNING]
    assert continuations(family, COMMON_BEGINNING, 20) == texts


@torch.no_grad()
def test_keys_times_weight_are_the_output(family):
    site = Site(1, "mlp_out")
    ids = torch.tensor([[5, 9, 3, 77, 20]])
    with capture(family, [site], side="in") as keys, capture(family, [site]) as values:
        family.model(input_ids=ids)
    module = family.module(site)
    bias = module.bias if getattr(module, "bias", None) is not None else 0
    torch.testing.assert_close(
        values[site], keys[site] @ family.oriented(Site(1, "mlp_out")).T + bias, rtol=1e-4, atol=1e-5
    )
    assert (
        family.weight(Site(1, "mlp_out")).shape
        == (
            family.oriented(Site(1, "mlp_out")).T if is_transposed(module) else family.oriented(Site(1, "mlp_out"))
        ).shape
    )


@torch.no_grad()
@pytest.mark.parametrize("role", ["block", "mlp_out", "attn_out"])
def test_an_injected_value_changes_logits_from_its_position_on(family, role):
    ids, at = torch.tensor([[5, 9, 3, 77, 20]]), 2
    value = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    before = family.model(input_ids=ids).logits
    with inject(family, Site(1, role), value, torch.tensor([at])):
        changed = family.model(input_ids=ids).logits
    assert torch.equal(changed[:, :at], before[:, :at])
    assert all(not torch.allclose(changed[:, i], before[:, i], atol=1e-4) for i in range(at, ids.shape[1]))


def edit(lm, requests, quiet, layers=LAYERS, **changes):
    targets = GradientSearch(steps=20, lr=0.5, clamp=30.0, essence=None)
    parts = {
        "solver": LeastSquares(),
        "targets": targets,
        "max_relative_update": 1e9,
        **changes,
    }  # a multiplier needs more
    return fit_tiny(lm, layers, requests, quiet, 1e-9, **parts)


def chances(lm, requests):
    return score_targets(lm, [r.text for r in requests], [r.target_new for r in requests])[0]


@torch.no_grad()
def sharpened(lm):
    """The model with a larger last norm: otherwise no token gets more than a few per cent."""
    lm.module(lm.architecture.final_norm).weight.add_(20)
    return lm


@torch.no_grad()
def other_keys(lm, site, requests):
    """Second moments of the keys of the prompts' tokens in front of their subjects' last ones."""
    keys = []
    for row in (rows[0] for rows in encode_batch(lm, requests, Contexts()).rows):
        with capture(lm, [site], side="in") as entering:
            lm(input_ids=torch.tensor([row.ids]))
        keys.append(entering[site][0, : row.subject])
    moment = torch.cat(keys).T @ torch.cat(keys)
    return moment + 1e-8 * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)


SHORT = [replace(FACTS[0], target_new="the"), replace(FACTS[1], target_new="in")]
"""The same with targets of one token, whose prediction is read where the edit is made."""


def test_the_searched_change_arrives(family, quiet):
    """Whatever stands between the MLP and the residual stream: a multiplier, a norm behind it, or nothing."""
    family.model.double()
    low, moment = chances(sharpened(family), SHORT), other_keys(family, Site(2, "mlp_out"), SHORT)
    targets = GradientSearch(steps=40, lr=0.5, clamp=30.0, essence=None, decay=None)
    parts = {"moments": {2: 1e-7 * moment}, "max_relative_update": 1e9}
    module = fit_tiny(family, [2], SHORT, quiet, 0.0, solver=LeastSquares(), targets=targets, **parts)
    (step,) = module.journal
    assert step.numbers["target/arrived"] > 0.99
    searched = torch.tensor([target.probability for target in step.targets])
    assert bool((searched.log() > low + 1).all())
    torch.testing.assert_close(chances(family, SHORT).exp().float(), searched, rtol=0, atol=0.01)


def test_one_edit_raises_the_targets_and_is_taken_back_bit_for_bit(family, quiet):
    before = {name: tensor.clone() for name, tensor in sharpened(family).model.state_dict().items()}
    low = chances(family, SHORT)
    module = edit(family, SHORT, quiet)
    assert bool((chances(family, SHORT) > low + 0.3).all())
    written = {f"{family.architecture.path(Site(layer, 'mlp_out'))}.weight" for layer in LAYERS}
    changed = {name for name, tensor in family.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == written
    module.journal.rollback()
    assert all(torch.equal(tensor, before[name]) for name, tensor in family.model.state_dict().items())


@torch.no_grad()
def test_padding_sides_agree(family, requests):
    result = []
    for side in ("left", "right"):
        family.tokenizer.padding_side = side
        batch = encode_batch(family, requests[:4], Contexts())
        result.append(FactReader(family, batch).read(Site(1, "mlp_out"), Site(2)))
        texts = [row[0].ids[: row[0].subject + 1] for row in batch.rows]
        for i, ids in enumerate(texts):  # each prompt alone, without any padding
            with capture(family, [Site(1, "mlp_out")], side="in") as keys:
                family.model(input_ids=torch.tensor([ids]))
            torch.testing.assert_close(result[-1][0][i], keys[Site(1, "mlp_out")][0, -1].double(), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(one, other) for one, other in zip(*result, strict=True))


def test_exact_allocation(family, quiet):
    """Products with Jacobians need attention and MLP to be differentiated twice; they check themselves."""
    low = chances(sharpened(family), SHORT)
    edit(family, SHORT, quiet, allocator=Jacobian(tolerance=1e-3))
    assert bool((chances(family, SHORT) > low + 0.3).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_half_precision_is_edited_and_taken_back_bit_for_bit(name, dtype, lm, quiet):
    half = random_model(name, lm.tokenizer, **{**COMMON, **FAMILIES[name]})
    half.model.to(dtype)
    before, low = {key: part.clone() for key, part in half.model.state_dict().items()}, chances(half, FACTS)
    module = edit(half, FACTS, quiet)
    assert half.dtype == dtype
    assert bool((chances(half, FACTS) > low + 0.3).all())
    assert all(
        each.dtype == torch.float64 for change in module.journal.changes for each in (change.keys, change.update.right)
    )
    module.journal.rollback()
    assert all(torch.equal(part, before[key]) for key, part in half.model.state_dict().items())
