"""Texts from every kind of source, and the model's own samples."""

import gzip
import json

import datasets
import pytest
import torch

from cakeflow.data.sources import read_texts
from cakeflow.errors import StatisticsError
from cakeflow.forward.corpus import OPENINGS, TOPICS, sampled_corpus, token_stream
from cakeflow.forward.generation import continuations

TEXTS = ["First document.\nIt has two lines.", "Zweites Dokument, größer.", "third"]


def jsonl(texts=TEXTS):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def write(folder, kind):
    dataset = datasets.Dataset.from_dict({"text": TEXTS, "other": [1, 2, 3]})
    if kind == "dataset":
        return dataset
    path = folder / f"corpus.{kind}"
    if kind == "folder":
        dataset.save_to_disk(path)
    elif kind == "arrow":
        dataset.save_to_disk(folder / "saved")
        return next((folder / "saved").glob("*.arrow"))
    elif kind.endswith(".gz"):
        path.write_bytes(gzip.compress(jsonl().encode()))
    else:
        path.write_text(jsonl(), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "arrow", "folder", "dataset"])
def test_records(tmp_path, kind):
    assert list(read_texts(write(tmp_path, kind))) == TEXTS


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[0], encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(TEXTS[1].encode()))
    assert list(read_texts(tmp_path / "a.txt")) == [TEXTS[0]]
    assert list(read_texts(str(tmp_path / "b.txt.gz"))) == [TEXTS[1]]
    assert list(read_texts([tmp_path / "a.txt", str(tmp_path / "b.txt.gz"), write(tmp_path, "dataset")])) == [
        *TEXTS[:2],
        *TEXTS,
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [('{"text": "a"}\nnot json\n', "line 2"), ('{"body": "a"}\n', "line 1.*field 'text'"), ("[1]\n", "line 1")],
)
def test_bad_lines_are_named(tmp_path, content, words):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(StatisticsError, match=words):
        list(read_texts(tmp_path / "bad.jsonl"))


def test_a_text_that_is_not_a_string_is_refused(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"text": 5}\n')
    with pytest.raises(StatisticsError, match="line 2"):
        list(read_texts(tmp_path / "bad.jsonl"))


def test_sources_without_text_are_refused(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(StatisticsError, match="record 0: needs a field 'text'"):
        list(read_texts(datasets.Dataset.from_dict({"body": ["x"]})))
    with pytest.raises(StatisticsError, match=r"corpus 'no/such-file\.arrow' is neither"):
        list(read_texts("no/such-file.arrow"))


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
    first = sampled_corpus(tiny, 640)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.is_relative_to(cache)
    monkeypatch.setenv("CAKEFLOW_CACHE", str(tmp_path / "elsewhere"))
    torch.manual_seed(99)
    again = sampled_corpus(tiny, 640)
    assert again != first
    assert again.read_bytes() == first.read_bytes()
    assert sampled_corpus(tiny, 640, seed=1).read_bytes() != first.read_bytes()
    texts = list(read_texts(first))
    assert len(texts) == len(OPENINGS) * len(TOPICS)
    assert texts[0].startswith("The history of the sea")
    assert len(token_stream(tiny, texts, 10**6)) >= 640


def test_a_sample_depends_on_its_opening_alone(tiny, cache):
    """Whichever samples are made beside it; 640 tokens are 5 for each of the 128 openings."""
    texts = list(read_texts(sampled_corpus(tiny, 640)))
    for number, topic in ((0, TOPICS[0]), (len(TOPICS) + 2, TOPICS[2])):
        prompt = OPENINGS[number // len(TOPICS)].format(topic)
        settings = {"top_k": 50, "seed": 0, "endless": True, "with_prompt": True}
        assert continuations(tiny, [prompt], 5, 1, **settings) == [texts[number]]


def test_the_sampled_corpus_is_made_once(lm, cache):
    first = sampled_corpus(lm, 128)
    first.write_text("kept")
    assert sampled_corpus(lm, 128).read_text() == "kept"
    with torch.no_grad():
        lm.weight(0)[0, 0] += 1
    assert sampled_corpus(lm, 128) != first
