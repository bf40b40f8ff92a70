"""Continuations: greedy ones are what the model says alone, sampled ones follow its distribution."""

import pytest
import torch
from conftest import COMMON_BEGINNING, alone, random_model, tokens_alone
from tokenizers.processors import TemplateProcessing
from tqdm.auto import tqdm
from transformers import GenerationConfig

from cakeflow.errors import ConfigError, RequestError
from cakeflow.forward.generation import (
    LEAST_SHARED,
    SEEDS,
    TopK,
    cached_bytes,
    chat_template,
    continuations,
    generate_contexts,
    gumbel,
)
from cakeflow.models import Site

PROMPTS = ["The sea is", "Ann", "All about the town of Lund", "Bob", "Ann"]


@pytest.mark.parametrize("max_tokens", [1, 40, 4096])
@pytest.mark.parametrize("tokens", [1, 5])
def test_each_is_what_the_model_says_alone(tiny, tokens, max_tokens):
    got = continuations(tiny, PROMPTS, tokens, max_tokens)
    assert got == [alone(tiny, prompt, tokens) for prompt in PROMPTS]


def passes(lm):
    """Rows and tokens of every pass from now on."""
    shapes = []
    lm.module(Site(0)).register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[:2])))
    return shapes


def test_a_common_beginning_is_run_once(tiny):
    assert tiny.frees_rows  # asks the model, once
    shapes = passes(tiny)
    assert continuations(tiny, COMMON_BEGINNING, 20) == [alone(tiny, prompt, 20) for prompt in COMMON_BEGINNING]
    lengths = [len(tiny.tokenizer(prompt)["input_ids"]) for prompt in COMMON_BEGINNING]
    (rows, shared), second = shapes[:2]
    assert rows == 1
    assert LEAST_SHARED <= shared < min(lengths)
    assert second == (5, max(lengths) - shared)


def test_what_has_ended_leaves(tiny):
    """Texts that end at different tokens, some of them never."""
    whole = [tokens_alone(tiny, prompt, 30) for prompt in COMMON_BEGINNING]
    end = tiny.model.generation_config.eos_token_id = sorted({whole[0][4], whole[2][12]})
    shapes = passes(tiny)
    assert continuations(tiny, COMMON_BEGINNING, 30) == [alone(tiny, prompt, 30, end) for prompt in COMMON_BEGINNING]
    assert 1 <= shapes[-1][0] < 5


def test_a_text_may_be_left_where_the_rest_does_not_matter(tiny):
    whole = dict(zip(COMMON_BEGINNING, continuations(tiny, COMMON_BEGINNING, 40), strict=True))
    done = whole[COMMON_BEGINNING[1]][:9]
    got = continuations(tiny, COMMON_BEGINNING, 40, ends=lambda text: text.startswith(done))
    for prompt, text in zip(COMMON_BEGINNING, got, strict=True):
        assert whole[prompt].startswith(text)
        assert (len(text) < len(whole[prompt])) == whole[prompt].startswith(done)


SMALL = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 600,
    "intermediate_size": 48, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.6,
}  # fmt: skip
LONGER = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
    "original_max_position_embeddings": 47,  # what the prompts share has as many tokens
}  # fmt: skip
CHUNKS = {
    "intermediate_size_mlp": 48, "head_dim": 8, "num_local_experts": 2, "attention_chunk_size": 24, "pad_token_id": 0,
    "layer_types": ["chunked_attention"] * 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", {"rope_parameters": LONGER, "max_position_embeddings": 104}), ("llama4_text", CHUNKS)],
)
def test_positions_that_depend_on_the_length_are_those_of_the_whole_text(lm, family, settings):
    """A common beginning is not run alone where the model would read it otherwise."""
    lm = random_model(family, lm.tokenizer, **SMALL, **settings)
    assert continuations(lm, COMMON_BEGINNING, 12) == [alone(lm, prompt, 12, [0]) for prompt in COMMON_BEGINNING]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 3),
        ("no_repeat_ngram_size", 2),
        ("encoder_repetition_penalty", 1.5),
        ("cache_implementation", "static"),
    ],
)
def test_what_a_folder_says_of_how_to_generate_does_not_count(tiny, name, value):
    expected = continuations(tiny, COMMON_BEGINNING, 20)
    own = tiny.model.generation_config = GenerationConfig(**{name: value})
    assert continuations(tiny, COMMON_BEGINNING, 20) == expected
    assert tiny.model.generation_config is own


def test_a_gib_of_keys_and_values_is_that(tiny):
    with torch.no_grad():
        kept = tiny.model(input_ids=torch.zeros(1, 7, dtype=torch.long), use_cache=True).past_key_values
    assert 7 * cached_bytes(tiny) == sum(part.nbytes for layer in kept.layers for part in (layer.keys, layer.values))


def test_a_text_ends_where_the_models_positions_do(lm):
    """However long it may become, and whatever runs beside it."""
    long = " ".join(["sea"] * lm.longest)
    ids = lm.tokenizer(long)["input_ids"][: lm.longest - 3]
    near, room = lm.tokenizer.decode(ids), lm.longest - len(ids)
    for prompts in ([near], [long], [near, "Ann", long]):
        for total in (False, True):
            got = continuations(lm, prompts, lm.longest if total else 6, total=total, max_tokens=10 * lm.longest)
            expected = {near: alone(lm, near, room), long: ""}
            assert [text for prompt, text in zip(prompts, got, strict=True) if prompt != "Ann"] == [
                expected[prompt] for prompt in prompts if prompt != "Ann"
            ]


def test_total_counts_the_prompt(tiny):
    room = [12 - len(tiny.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    assert min(room) < max(room)
    got = continuations(tiny, PROMPTS, 12, total=True)
    assert got == [alone(tiny, prompt, tokens) for prompt, tokens in zip(PROMPTS, room, strict=True)]
    assert continuations(tiny, PROMPTS, 1, total=True) == [""] * len(PROMPTS)


def test_nothing_to_continue(lm):
    assert continuations(lm, []) == []


def test_samples_are_a_rows_own(tiny):
    """They depend on the seed and the row, not on the batch or the global random state; repetitions differ."""
    state = torch.get_rng_state()
    got = continuations(tiny, PROMPTS, 8, top_k=5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert got == continuations(tiny, PROMPTS, 8, max_tokens=1, top_k=5, seed=1)
    assert got[1] == continuations(tiny, ["Ann"], 8, top_k=5, seed=1)[0] != got[4]
    assert got != continuations(tiny, PROMPTS, 8, top_k=5, seed=2)
    assert (
        continuations(tiny, PROMPTS[:1], 3, top_k=5, seed=1)[0]
        == continuations(tiny, PROMPTS[:1], 8, top_k=5, seed=1)[0][
            : len(continuations(tiny, PROMPTS[:1], 3, top_k=5, seed=1)[0])
        ]
    )


def recorded(monkeypatch):
    """The progress bars of the generation, with the sizes of their updates."""
    bars = []

    class Bar(tqdm):
        def __init__(self, total, title, unit):
            super().__init__(total=total, desc=title, unit=unit, disable=True)
            self.total, self.title, self.updates = total, title, []
            bars.append(self)

        def update(self, n=1):
            self.n += n
            self.updates.append(n)

    monkeypatch.setattr("cakeflow.forward.generation.progress_bar", Bar)
    return bars


@pytest.mark.parametrize("max_tokens", [1, 40, 4096])
def test_the_bar_counts_tokens_while_they_are_generated(tiny, monkeypatch, max_tokens):
    bars = recorded(monkeypatch)
    continuations(tiny, PROMPTS, 12, max_tokens, total=True, title="texts")
    sizes = [max(0, 12 - len(tiny.tokenizer(prompt)["input_ids"])) for prompt in dict.fromkeys(PROMPTS)]
    (bar,) = bars
    assert bar.title == "texts"
    assert bar.n == bar.total == sum(sizes)
    assert max(bar.updates) <= len(sizes)  # one forward pass at most
    assert len([n for n in bar.updates if n]) >= max(sizes)


def ending(lm):
    """Let the model end every text at once, whatever comes before."""
    head = torch.nn.Linear(lm.head.in_features, lm.head.out_features, dtype=lm.dtype)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    head.bias.data[lm.tokenizer.eos_token_id] = 50.0
    lm.model.set_output_embeddings(head)
    lm.model.generation_config.eos_token_id = lm.tokenizer.eos_token_id
    return lm


def test_texts_end_by_themselves_unless_they_are_endless(lm, monkeypatch):
    bars = recorded(monkeypatch)
    for top_k in (1, 5):
        assert continuations(ending(lm), PROMPTS, 6, top_k=top_k) == [""] * len(PROMPTS)
        assert bars[-1].n == bars[-1].total > 1
        texts = continuations(lm, PROMPTS, 6, top_k=top_k, endless=True)
        assert [len(lm.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts] == [6] * len(PROMPTS)


@pytest.mark.parametrize("top_k", [1, 5])
def test_a_prompt_comes_before_its_continuation(tiny, top_k):
    texts = continuations(tiny, PROMPTS, 5, top_k=top_k, with_prompt=True)
    assert texts == [
        prompt + text for prompt, text in zip(PROMPTS, continuations(tiny, PROMPTS, 5, top_k=top_k), strict=True)
    ]


def test_contexts_are_samples_of_the_seed_words(tiny):
    """The same sampler: each seed word alone gives the same text, in any batch."""
    group = generate_contexts(tiny, seed=3).groups[1]
    for word, context in zip(SEEDS, group, strict=True):
        (text,) = continuations(tiny, [word], 10, 1, total=True, top_k=5, seed=3, with_prompt=True)
        assert context == text.replace("{", " ").replace("}", " ").strip() + ". {}"


def test_samples_follow_the_distribution():
    """Frequencies of 20,000 draws among the three most likely of five tokens; the others are never drawn."""
    scores = torch.tensor([1.0, 2.0, -1.0, 0.5, 1.5])
    draw = TopK(gumbel(range(20_000), 1, 3), 4)(torch.zeros(20_000, 4), scores.expand(20_000, 5)).argmax(1)
    expected = torch.zeros(5)
    expected[[0, 1, 4]] = scores[[0, 1, 4]].softmax(0)
    shares = torch.bincount(draw, minlength=5) / 20_000
    torch.testing.assert_close(shares, expected, rtol=0, atol=4 * 0.5 / 20_000**0.5)  # four standard errors
    assert shares[2] == shares[3] == 0


def test_texts_keep_to_a_limit_of_bytes(tiny):
    prompts, rows = [f"The river number {n} flows into" for n in range(20)], []
    free = continuations(tiny, prompts, 5)
    tiny.module(Site(0)).register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    assert continuations(tiny, prompts, 5, max_bytes=1e9) == free
    assert max(rows) == 20
    rows.clear()
    assert continuations(tiny, prompts, 5, max_bytes=1e6) == free
    assert 1 <= max(rows) < 20
    with pytest.raises(ConfigError, match="writing a text of"):
        continuations(tiny, prompts, 5, max_bytes=1000)


@pytest.mark.parametrize("top_k", [1, 5])
def test_texts_go_on_from_prompts_without_an_end(tiny, top_k):
    """A tokenizer that puts an end-of-text token behind every text changes nothing."""
    settings = {"top_k": top_k, "with_prompt": True}
    expected, contexts = continuations(tiny, PROMPTS, 5, **settings), generate_contexts(tiny, 3)
    number = tiny.tokenizer.eos_token_id
    tiny.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", number)]
    )
    assert tiny.tokenizer("a")["input_ids"][-1] == number
    assert continuations(tiny, PROMPTS, 5, **settings) == expected
    assert generate_contexts(tiny, 3) == contexts


@pytest.mark.parametrize("top_k", [1, 5])
def test_a_tokenizer_may_have_no_end_of_text_token(tiny, top_k):
    expected = continuations(tiny, PROMPTS, 5, top_k=top_k)
    tiny.tokenizer.eos_token = tiny.tokenizer.pad_token = None
    assert tiny.tokenizer.eos_token_id is None
    assert continuations(tiny, PROMPTS, 5, top_k=top_k) == expected


def test_prompts_with_tokens_beyond_the_embedding_are_refused(lm):
    lm.tokenizer.add_tokens(["<ent>"])
    with pytest.raises(RequestError, match=r"entry 1, prompt = 'An <ent> is': has the token '<ent>'"):
        continuations(lm, ["Ann is", "An <ent> is"], 3)


def test_a_chat_begins_with_the_prompt(lm):
    lm.tokenizer.chat_template = (
        "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    )
    assert chat_template(lm) == "<user>{}"


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "no content", "{{ messages[0]['content'] * 2 }}"])
def test_a_template_that_cannot_write_a_fact_is_refused_with_the_remedy(lm, template):
    lm.tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=r"facts cannot be written in a chat: .* set chat to false"):
        chat_template(lm)
