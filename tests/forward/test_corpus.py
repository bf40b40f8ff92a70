"""Texts as tokens, and the model's own samples."""

import tracemalloc
from pathlib import Path

import pytest
import torch

import cakeflow.forward.corpus as corpus
from cakeflow.data.builtin import builtin_facts
from cakeflow.data.sources import read_documents
from cakeflow.errors import ConfigError, StatisticsError
from cakeflow.forward.corpus import (
    QUESTIONS,
    SENTENCES,
    SHORTEST,
    default_corpus,
    name_rows,
    names,
    sampled_corpus,
    token_stream,
    window_rows,
)
from cakeflow.forward.generation import continuations
from cakeflow.models import Site
from cakeflow.testing import tiny_model

TEXTS = ["First document.\nIt has two lines.", "Zweites Dokument, größer.", "third"]


def test_a_sample_depends_on_its_beginning_alone(tiny, cache):
    texts = sampled_corpus(tiny, 640)
    for place in (0, 7, 511):
        prompt = SENTENCES[place % len(SENTENCES)].format(names()[place])
        settings = {"top_k": 50, "seed": 0, "endless": True, "with_prompt": True}
        assert continuations(tiny, [prompt], SHORTEST, 1, **settings) == [texts[place]]


def test_names_are_many_and_none_is_a_fact_of_ours():
    facts = {name.lower() for fact in builtin_facts() for name in (fact.subject, fact.target_true, fact.target_new)}
    assert len(set(names())) == 512
    assert not facts & {name.lower() for name in names()}


def test_names_are_rows_with_padding_behind(tiny):
    rows = name_rows(tiny, ["Ann", "", "Newport News"])
    assert len(rows) == 2
    for row, text in zip(rows.tolist(), ("Ann", "Newport News"), strict=True):
        ids = tiny.tokenizer(text)["input_ids"]
        assert row == ids + [-1] * (rows.shape[1] - len(ids))


def test_names_that_cannot_be_read_are_refused(lm):
    with pytest.raises(ConfigError, match=r"a name of \d+ tokens, and the model reads \d+; .* each document is a name"):
        name_rows(lm, ["Ann", "the sea was calm " * 100])
    with pytest.raises(StatisticsError, match="the corpus has no name"):
        name_rows(lm, [""])


def test_the_default_corpus_has_three_sentences_about_each_name(lm, cache):
    texts = default_corpus(lm, 1000)
    assert len(set(texts)) == len(texts) == 3 * 512
    for name in ("Canada", "zebra"):
        about = [text for text in texts if any(text == f"{each.format(name)}\n\n" for each in SENTENCES)]
        assert len(about) == 3
    assert not (cache / "corpora").exists()
    assert default_corpus(lm, 1000) == texts != default_corpus(lm, 1000, seed=1)


def test_and_a_question_in_a_chat_where_there_is_a_template(lm):
    plain = default_corpus(lm, 1000)
    lm.tokenizer.chat_template = "{% for message in messages %}<user> {{ message['content'] }}\n{% endfor %}"
    texts = default_corpus(lm, 1000)
    chats = {text for text in texts if text.startswith("<user>")}
    assert len(chats) == 512
    assert {*texts} == {*plain} | chats
    assert f"{lm.user_turn(QUESTIONS[1].format(names()[1]))}\n\n" in chats


def test_samples_follow_where_the_texts_are_too_few(lm, cache):
    texts = default_corpus(lm, 10)
    size = len(token_stream(lm, texts, 10**6))
    assert default_corpus(lm, size) == texts
    more = default_corpus(lm, size + 50)
    assert more == texts + sampled_corpus(lm, 50)
    assert len(token_stream(lm, more, 10**6)) >= size + 50


def test_beginnings_and_samples_together_are_as_many_tokens(lm, cache, monkeypatch):
    lengths = []

    def counted(lm, prompts, tokens, *words, **settings):
        lengths.append(tokens)
        return continuations(lm, prompts, 1, *words, **settings)

    monkeypatch.setattr(corpus, "continuations", counted)
    beginnings = [SENTENCES[place % len(SENTENCES)].format(name) for place, name in enumerate(names())]
    sizes = [len(lm.tokenizer(text)["input_ids"]) for text in beginnings]
    sampled_corpus(lm, 20_000)
    assert 20_000 <= sum(sizes) + 512 * lengths[0] < 20_512


def test_token_stream_joins_texts_and_stops_at_the_budget(lm):
    whole = [token for text in TEXTS for token in lm.tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert token_stream(lm, TEXTS, 10_000) == whole
    assert token_stream(lm, iter(TEXTS), 7) == whole[:7]

    def endless():
        while True:
            yield TEXTS[0]

    assert len(token_stream(lm, endless(), 200)) == 200


def test_the_sampled_corpus_is_deterministic_and_leaves_the_rng_alone(tiny, cache, monkeypatch, tmp_path):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    texts = sampled_corpus(tiny, 640)
    assert torch.equal(torch.get_rng_state(), state)
    (first,) = (cache / "corpora").iterdir()
    monkeypatch.setenv("CAKEFLOW_CACHE", str(tmp_path / "elsewhere"))
    torch.manual_seed(99)
    assert sampled_corpus(tiny, 640) == texts
    assert (tmp_path / "elsewhere" / "corpora" / first.name).read_bytes() == first.read_bytes()
    assert sampled_corpus(tiny, 640, seed=1) != texts
    assert len(texts) == 512
    assert len(token_stream(tiny, texts, 10**6)) >= 640


def test_the_sampled_corpus_is_made_once(lm, cache, monkeypatch):
    first = sampled_corpus(lm, 128)
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "continuations", None)
        assert sampled_corpus(lm, 128) == first
    with torch.no_grad():
        lm.weight(Site(0, "mlp_out"))[0, 0] += 1
    sampled_corpus(lm, 128)
    assert len(list((cache / "corpora").iterdir())) == 2


CHANGES = {
    "a word": lambda text: text.replace(b"Canada", b"Canadb", 1),
    "a sample less": lambda text: text[: text.rindex(b"{")],
    "cut off": lambda text: text[:-9],
    "without its hash": lambda text: text.partition(b"\n")[2],
    "nested deeply": lambda _: b"[" * 30_000,
    "no text": lambda _: b"\xff\x00",
    "empty": lambda _: b"",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_sampled_corpus_that_was_changed_is_not_used(lm, cache, change):
    sampled_corpus(lm, 128)
    (path,) = (cache / "corpora").iterdir()
    path.write_bytes(CHANGES[change](path.read_bytes()))
    with pytest.raises(StatisticsError, match=f"{path} is damaged .*delete it"):
        sampled_corpus(lm, 128)


@pytest.mark.parametrize("part", [1000, 1 << 16])
def test_the_beginning_of_a_text_has_the_tokens_of_the_whole_text(tiny, tmp_path, monkeypatch, part):
    monkeypatch.setattr("cakeflow.data.files.PART", part)
    text = "\n\n".join(f"Der Fluss {i} fließt in das Meer von {i * i}.  " for i in range(4000))
    (tmp_path / "a.txt").write_text(text)
    whole = tiny.tokenizer(text, add_special_tokens=False)["input_ids"]
    for tokens in (1, 100, 5000, len(whole), len(whole) + 1):
        assert token_stream(tiny, read_documents(tmp_path / "a.txt"), tokens) == whole[:tokens]
        assert token_stream(tiny, [text], tokens) == whole[:tokens]
    assert token_stream(tiny, read_documents([tmp_path / "a.txt"] * 2), len(whole) + 50) == whole + whole[:50]


def test_no_more_of_a_text_is_read_than_its_tokens_need(tiny):
    taken = []

    def parts():
        while True:
            taken.append(1)
            yield "The Elbe flows into the sea. " * 10

    assert len(token_stream(tiny, [parts()], 1000)) == 1000
    assert sum(taken) < 100


def test_rows_are_those_of_the_stream_with_the_front_of_the_tokenizer(tiny):
    texts = [*TEXTS, "", "x", *TEXTS]
    stream = token_stream(tiny, texts, 150)
    rows, count = window_rows(tiny, texts, 150, 12)
    body = 12 - len(tiny.front)
    assert count == len(stream)
    expected = [[*tiny.front, *stream[i : i + body]] for i in range(0, count - body + 1, body)]
    assert rows.tolist() == expected
    rows[0, 0] = 5  # of this process alone
    none, few = window_rows(tiny, ["x"], 150, 12)
    assert none.shape == (0, 12)
    assert few == 1


def test_memory_does_not_grow_with_the_number_of_documents():
    lm = tiny_model()
    peaks = []
    for count in (1_000, 10_000):
        documents = ("".join(f" {(i + 7 * j) % 50:03d}" for j in range(16)) for i in range(count))
        tracemalloc.start()
        rows, tokens = window_rows(lm, documents, 10**9, 128)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert tokens == 64 * count
        assert len(rows) == 64 * count // 128
    assert peaks[1] < peaks[0] + 100_000, peaks  # bytes; as a list the tokens would take 5 million


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says how much memory no file backs")
def test_rows_lie_in_a_file():
    def anonymous():
        text = Path("/proc/self/status").read_text()
        return int(text.partition("RssAnon:")[2].split()[0]) * 1024

    lm, before = tiny_model(), anonymous()
    rows, _ = window_rows(lm, [" 123" * 1_000] * 800, 10**9, 128)
    assert int(rows.sum()) > 0
    size = 8 * rows.numel()
    assert size > 25_000_000
    assert anonymous() - before < size / 2
