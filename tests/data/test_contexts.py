"""Contexts: weights, checks and seeded sampling."""

import copy

import pytest
import torch

from cakeflow import Contexts
from cakeflow.errors import ConfigError
from cakeflow.forward.generation import SEEDS, generate_contexts


def test_weights_are_means_of_means():
    assert Contexts().weights == (1.0,)
    assert Contexts((("{}",), ("a {}", "b {}", "c {}", "d {}", "e {}"))).weights == (0.5, *[0.1] * 5)
    assert Contexts((("{}", "a {}"), ("b {}",))).weights == (0.25, 0.25, 0.5)


def test_flat_list():
    contexts = Contexts.of(["{}", "a {}", "b {}"])
    assert contexts == Contexts((("{}",), ("a {}", "b {}")))
    assert contexts.templates == ("{}", "a {}", "b {}")
    assert Contexts.of(["{}"]) == Contexts()


@pytest.mark.parametrize(
    "groups",
    [(), ((),), (("{}",), ()), (("a {}",),), (("{} a",), ("{}",)), (("{}",), ("no place",)), (("{}",), ("{} and {}",))],
)
def test_bad_templates(groups):
    with pytest.raises(ConfigError, match="context"):
        Contexts(groups)


@pytest.mark.parametrize("templates", [[], ["a {}", "{}"], ["{}", "none"]])
def test_bad_flat_lists(templates):
    with pytest.raises(ConfigError, match="context"):
        Contexts.of(templates)


def test_sampling_depends_on_the_seed_alone(tiny):
    torch.manual_seed(1)
    first = generate_contexts(tiny, seed=5)
    torch.manual_seed(2)
    assert generate_contexts(copy.deepcopy(tiny), seed=5) == first
    assert generate_contexts(tiny, seed=6) != first


def test_sampling_leaves_the_random_state_alone(lm):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    generate_contexts(lm)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_sampling_leaves_the_model_alone(lm):
    before = lm.fingerprint()
    settings = lm.model.generation_config.to_dict()
    generate_contexts(lm)
    assert lm.fingerprint() == before
    assert lm.model.generation_config.to_dict() == settings


def test_sampled_contexts_have_half_of_the_weight(lm):
    contexts = generate_contexts(lm)
    assert contexts.weights == (0.5, *[0.1] * 5)
    assert contexts.templates[0] == "{}"
    for word, template in zip(SEEDS, contexts.templates[1:], strict=True):
        assert template.startswith(word)
        assert template.endswith(". {}")


def always(lm, text):
    """Let the model continue everything with one of some one-token texts."""
    ids = lm.tokenizer.convert_tokens_to_ids(list(text))
    head = torch.nn.Linear(lm.head.in_features, lm.head.out_features, dtype=lm.dtype)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.constant_(head.bias, -50.0)
    head.bias.data[ids] = 50.0
    lm.model.set_output_embeddings(head)
    return lm


@pytest.mark.parametrize("length", [8, 14])
def test_sampled_texts_have_the_length_asked_for(lm, length):
    templates = generate_contexts(always(lm, "a"), length=length).templates[1:]
    for word, template in zip(SEEDS, templates, strict=True):
        more = length - len(lm.tokenizer(word)["input_ids"])
        assert more > 0
        assert template == word + "a" * more + ". {}"


def test_braces_are_removed_from_sampled_texts(lm):
    for template in generate_contexts(always(lm, "{}")).templates[1:]:
        assert template.count("{") == template.count("}") == 1


def test_chats_are_the_last_templates_with_a_key_of_their_own():
    contexts = Contexts((("{}",), ("a {}", "b {}")), chats=("user: {}", "again: {}"))
    assert contexts.templates == ("{}", "a {}", "b {}", "user: {}", "again: {}")
    assert contexts.keys == (0, 0, 0, 1, 1)
    assert contexts.weights == (0.5, 0.25, 0.25, 0.5, 0.5)


def test_a_chat_needs_a_place_for_the_prompt():
    with pytest.raises(ConfigError, match="context 'user:' needs exactly one"):
        Contexts(chats=("user:",))
