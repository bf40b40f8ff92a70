"""Models inside wrappers: edited beneath the wrapper, or refused in one line."""

import copy
import warnings

import pytest
import torch
from tiny_runs import editor_of, module_of, name_of
from torch import nn
from transformers import AutoModelForCausalLM

from cakeflow import Editor
from cakeflow.errors import ArchitectureError, ConfigError
from cakeflow.models.language import LanguageModel
from cakeflow.models.wrappers import unwrapped

SHARED = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "data parallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
}


@pytest.mark.parametrize("wrap", SHARED.values(), ids=SHARED)
def test_a_model_is_edited_beneath_a_wrapper_that_shares_its_weights(lm, requests, quiet, tmp_path, wrap):
    lm.model.float()
    plain, ids = copy.deepcopy(lm), torch.tensor([[5, 6, 7, 8]])
    editor_of(plain, quiet).fit(requests[:2], evaluate=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapper = wrap(lm.model)
        before = wrapper(input_ids=ids).logits.detach()  # compiled before the edit
        inside = LanguageModel.wrap(wrapper, lm.tokenizer)
        assert inside.model is lm.model
        editor = editor_of(inside, quiet)
        editor.fit(requests[:2], evaluate=False)
        assert torch.equal(inside.weight(name_of(lm, 1)), plain.weight(name_of(lm, 1)))
        with torch.no_grad():
            assert not torch.equal(wrapper(input_ids=ids).logits, before)
            editor.save_pretrained(tmp_path / "out")
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
            assert torch.equal(loaded(input_ids=ids).logits, wrapper(input_ids=ids).logits)


def adapted(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))


def prompted(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def in_place(model):
    model.transformer.h[1].compile(backend="eager")
    return model


def by_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def one_block(model):
    model.transformer.h[1] = torch.compile(model.transformer.h[1], backend="eager")
    return model


REFUSED = {
    "peft": (adapted, r"^PeftModel is no model of transformers.*model\.merge_and_unload\(\)$"),
    "adapter": (lambda model: adapted(model).get_base_model(), r"c_attn has an adapter \(Linear\).*merge it first"),
    "prompts": (prompted, r"^PeftModel\w* is no model of transformers"),
    "block in place": (in_place, r"^transformer\.h\.1 was compiled in place"),
    "forward": (by_forward, r"^GPT2LMHeadModel was compiled in place"),
    "block": (one_block, r"^transformer\.h\.1 was compiled in place"),
    "module": (nn.Sequential, r"^Sequential is no model of transformers"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_other_wrappers_are_refused_in_one_line(lm, kind):
    change, words = REFUSED[kind]
    model = change(lm.model)
    with pytest.raises(ArchitectureError, match=words) as caught:
        Editor.from_pretrained(model, "memit", tokenizer=lm.tokenizer, layers=[1])
    assert len(str(caught.value)) < 300


@pytest.mark.filterwarnings("ignore")
def test_a_merged_adapter_is_a_model_like_any_other(lm, requests, quiet):
    lm.model.float()
    merged = adapted(lm.model).merge_and_unload()
    assert unwrapped(merged) is merged
    module = module_of(LanguageModel.wrap(merged, lm.tokenizer))
    Editor(module, quiet).fit(requests[:1], evaluate=False)
    assert len(module.journal) == 1


def test_a_wrapper_needs_its_tokenizer_like_any_model_object(lm):
    with pytest.raises(ConfigError, match="needs its tokenizer"):
        Editor.from_pretrained(nn.DataParallel(lm.model), "memit", layers=[1])
