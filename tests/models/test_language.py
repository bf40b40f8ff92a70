"""Loading, wrapping and fingerprinting models."""

import copy
import dataclasses

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel

from cakeflow import Architecture, LocateThenEdit
from cakeflow.errors import ArchitectureError
from cakeflow.forward.tokens import encode_texts
from cakeflow.models.architecture import Site
from cakeflow.models.language import LanguageModel
from cakeflow.storage.cache import cache_folder


def test_a_model_that_was_loaded_from_nowhere_is_named_by_its_class(lm):
    assert lm.name == lm.model.config._name_or_path
    lm.model.name_or_path = ""
    assert lm.name == "GPT2LMHeadModel"


def test_wrap_leaves_the_mode_and_finds_the_architecture(tiny):
    tiny.model.train()
    tiny.module(Site(1)).eval()
    modes = [module.training for module in tiny.model.modules()]
    wrapped = LanguageModel.wrap(tiny.model, tiny.tokenizer)
    assert [module.training for module in tiny.model.modules()] == modes
    assert wrapped.architecture == tiny.architecture
    assert (wrapped.depth, wrapped.dtype, wrapped.device) == (6, torch.float64, torch.device("cpu"))
    assert wrapped.head is tiny.model.get_output_embeddings()


def test_wrap_takes_an_architecture_by_hand_and_checks_it(lm):
    given = lm.architecture
    assert LanguageModel.wrap(lm.model, lm.tokenizer, given).architecture is given
    for role in ("block", "mlp_out", "attn_out"):
        wrong = dataclasses.replace(given, **{role: "transformer.nowhere.{}"})
        with pytest.raises(ArchitectureError, match=r"no module 'transformer\.nowhere\.0'"):
            LanguageModel.wrap(lm.model, lm.tokenizer, wrong)


def test_padding_and_truncation_of_the_tokenizer_do_not_change_the_fingerprint(lm):
    before, lm.tokenizer.pad_token = lm.fingerprint(), lm.tokenizer.eos_token
    lm.tokenizer(["one", "and two"], padding=True, truncation=True, max_length=7)
    assert lm.tokenizer.backend_tokenizer.padding
    settings = lm.tokenizer.backend_tokenizer.padding, lm.tokenizer.backend_tokenizer.truncation
    assert lm.fingerprint() == before
    assert settings == (lm.tokenizer.backend_tokenizer.padding, lm.tokenizer.backend_tokenizer.truncation)
    lm.tokenizer.add_tokens(["a new token"])
    assert lm.fingerprint() != before


def test_slow_tokenizer_is_refused(lm):
    with pytest.raises(ArchitectureError, match="ByT5Tokenizer gives no character offsets; load a fast tokenizer"):
        LanguageModel.wrap(lm.model, ByT5Tokenizer())


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_attention_without_explicit_masks_is_refused(lm, implementation):
    lm.model.config._attn_implementation_internal = implementation
    assert lm.model.config._attn_implementation == implementation
    with pytest.raises(ArchitectureError, match=f"'{implementation}'.*attn_implementation='sdpa'"):
        LanguageModel.wrap(lm.model, lm.tokenizer)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_with_masks_is_taken(tiny, implementation):
    tiny.model.set_attn_implementation(implementation)
    assert LanguageModel.wrap(tiny.model, tiny.tokenizer).depth == 6


def test_fingerprint_is_that_of_the_content(tiny):
    assert copy.deepcopy(tiny).fingerprint() == tiny.fingerprint()


@pytest.mark.parametrize("layer", [0, 3, 5])
def test_fingerprint_changes_with_one_element_of_a_weight(tiny, layer):
    before, below = tiny.fingerprint(), tiny.fingerprint(blocks=layer)
    up_to = tiny.fingerprint(blocks=layer + 1)
    weight = tiny.weight(Site(layer, "mlp_out")).data
    weight[1, 2] = torch.nextafter(weight[1, 2], torch.tensor(9.0, dtype=weight.dtype))
    assert tiny.fingerprint() != before
    assert tiny.fingerprint(blocks=layer + 1) != up_to
    assert (tiny.fingerprint(blocks=layer) == below) == (layer > 0)  # 0 means all


def test_fingerprint_changes_with_embedding_type_and_settings(tiny):
    before = {tiny.fingerprint(), tiny.fingerprint(blocks=1)}
    for change in (
        lambda one: one.model.get_input_embeddings().weight.data[0, 0].add_(1e-9),
        lambda one: one.model.to(torch.float32),
        lambda one: setattr(one.model.config, "max_position_embeddings", 77),
    ):
        changed = copy.deepcopy(tiny)
        change(changed)
        assert {changed.fingerprint(), changed.fingerprint(blocks=1)}.isdisjoint(before)


def test_fingerprint_changes_with_the_tokenizer(tiny):
    before = tiny.fingerprint()
    tiny.tokenizer.add_tokens(["qzxv"])
    assert tiny.fingerprint() != before


def test_integer_weights_are_refused(tiny):
    """As a quantized layer has them."""
    module = tiny.module(Site(2, "mlp_out"))
    module.weight = torch.nn.Parameter(torch.zeros_like(module.weight, dtype=torch.int8), requires_grad=False)
    assert tiny.weight(Site(1, "mlp_out")) is tiny.module(Site(1, "mlp_out")).weight
    for use in (tiny.weight, tiny.oriented, lambda site: LocateThenEdit(tiny, layers=[1, site.layer])):
        with pytest.raises(ArchitectureError, match=r"\.2\.mlp.*no floating-point weight.*dequantized"):
            use(Site(2, "mlp_out"))


def test_tied_embeddings_load_and_print(lm):
    config = GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=600, bos_token_id=0, eos_token_id=0)
    wrapped = LanguageModel.wrap(GPT2LMHeadModel(config), lm.tokenizer)
    assert wrapped.architecture == Architecture(
        "transformer.h.{}", "transformer.h.{}.mlp.c_proj", "transformer.h.{}.attn.c_proj", "transformer.ln_f", "lm_head"
    )


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("CAKEFLOW_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.delenv("CAKEFLOW_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "cakeflow"


def test_a_call_runs_the_model_without_dropout_and_gives_its_modes_back(lm):
    ids = torch.tensor([[5, 6, 7]])
    expected = lm.model(input_ids=ids).logits
    for module in lm.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    lm.model.train()
    lm.module(Site(1)).eval()
    modes = [module.training for module in lm.model.modules()]
    assert torch.equal(lm(input_ids=ids).logits, expected)
    with lm.evaluating():
        assert not any(module.training for module in lm.model.modules())
    with pytest.raises(KeyboardInterrupt), lm.evaluating():
        raise KeyboardInterrupt
    assert [module.training for module in lm.model.modules()] == modes


@pytest.mark.parametrize(("single", "front"), [("$A", ()), ("<s> $A", (1,)), ("$A </s>", ()), ("<s> $A </s>", (1,))])
def test_the_front_of_every_text(lm, single, front):
    template = TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    lm.tokenizer.backend_tokenizer.post_processor = template
    assert lm.front == front
    assert LanguageModel.wrap(lm.model, lm.tokenizer).front == front


def test_a_tokenizer_with_two_equal_tokens_in_front_is_named(lm):
    lm.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> <s> $A", special_tokens=[("<s>", 1)])
    with pytest.warns(UserWarning, match="in front of every text, one of them twice"):
        LanguageModel.wrap(lm.model, lm.tokenizer)


def test_a_chat_does_not_repeat_what_the_tokenizer_puts_in_front(lm):
    """Llama's and Gemma's templates write the beginning-of-text token, and so do their tokenizers."""
    tokenizer = lm.tokenizer
    plain = tokenizer("a")["input_ids"]
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = "{{ bos_token }}{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    assert lm.user_turn("Hi") == "<s>[Hi]"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert tokenizer("a")["input_ids"] == [tokenizer.bos_token_id, *plain]
    assert lm.user_turn("Hi") == "[Hi]"
    assert lm.user_turn("Hi", [{"role": "user", "content": "Ho"}]) == "[Ho][Hi]"
    ids = encode_texts(tokenizer, [lm.user_turn("Hi")])[0]
    assert ids.count(tokenizer.bos_token_id) == 1
