"""Fluency and consistency: hand-worked cases and definitions written out in plain Python."""

import json
import math
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cakeflow.data import builtin_facts
from cakeflow.errors import ConfigError
from cakeflow.metrics import AnswerRate, Consistency, Fluency
from cakeflow.metrics.text import fluency, ngram_entropy

words = st.lists(st.sampled_from(["rome", "sea", "lund", "is"]), max_size=12).map(" ".join)


def entropy(text, n):
    """The definition; the words of these texts are separated by blanks."""
    words = text.split()
    grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    return -sum(count / grams.total() * math.log2(count / grams.total()) for count in grams.values())


@given(words, st.sampled_from([1, 2, 3]))
def test_entropy_is_the_definition(text, n):
    assert ngram_entropy(text, n) == pytest.approx(entropy(text, n), abs=1e-12)


@given(words)
def test_fluency_weighs_two_entropies(text):
    assert fluency(text) == pytest.approx((2 / 3 * entropy(text, 2) + 4 / 3 * entropy(text, 3)) / 2, abs=1e-12)


def test_recorded_from_the_official_code():
    """Two sentences of our own, recorded with the official function; punctuation is split off, quotes change."""
    texts = [
        "The cat sat on the mat and the cat sat on the mat again.",
        "Paris is the capital of France, and it has been so since 987.",
    ]
    assert np.mean([fluency(text) for text in texts]) == pytest.approx(3.4869938703623475, abs=1e-12)


def test_records_count_alike():
    """One record with two texts and one with four weigh the same; a record without texts does not count."""
    metric = Fluency()
    metric.update([["a b c d", "a a a a"], []])
    metric.update([["a b a b"] * 4])
    expected = ((fluency("a b c d") + fluency("a a a a")) / 2 + fluency("a b a b")) / 2
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-6)


def cosine(first, second, weights):
    """Of two texts under given word weights."""
    one, other = (Counter(re.findall(r"(?u)\b\w\w+\b", text.lower())) for text in (first, second))
    dot = sum(one[w] * other[w] * weights.get(w, 0) ** 2 for w in one)
    norms = [math.sqrt(sum((c * weights.get(w, 0)) ** 2 for w, c in each.items())) for each in (one, other)]
    return dot / (norms[0] * norms[1]) if all(norms) else 0.0


TEXTS = [["Lund is a city. In Sweden!", "The city of LUND"], ["Nothing is known of it"], []]
REFERENCES = ["Lund, Sweden: a cathedral city", "Peru Peru Peru", "never read"]


def test_published_frequencies(tmp_path):
    """With the official files, words without a weight count for nothing."""
    weights = {"lund": 2.0, "sweden": 3.5, "city": 1.25, "peru": 4.0, "the": 1.0}
    (tmp_path / "vocab.json").write_text(json.dumps({word: place for place, word in enumerate(weights)}))
    np.save(tmp_path / "idf.npy", np.array(list(weights.values())))
    metric = Consistency(idf=tmp_path / "idf.npy", vocabulary=tmp_path / "vocab.json")
    metric.update(TEXTS, REFERENCES)
    expected = (cosine(" ".join(TEXTS[0]), REFERENCES[0], weights) + 0.0) / 2
    assert 0.3 < 2 * expected < 1
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("given_corpus", [True, False])
def test_counted_frequencies(tmp_path, given_corpus):
    """idf = ln((1 + texts) / (1 + texts with the word)) + 1, from a corpus or from the built-in references."""
    corpus = ["lund is a city", "peru is far", "the city of lund in sweden"]
    if not given_corpus:
        corpus = [fact.reference for fact in builtin_facts()]
    (tmp_path / "corpus.txt").write_text("\n".join(corpus))
    counts = Counter(word for text in corpus for word in set(re.findall(r"(?u)\b\w\w+\b", text.lower())))
    weights = {word: math.log((1 + len(corpus)) / (1 + count)) + 1 for word, count in counts.items()}
    metric = Consistency(corpus=tmp_path / "corpus.txt") if given_corpus else Consistency()
    metric.update(TEXTS[:1], REFERENCES[:1])
    assert float(metric.compute()) == pytest.approx(cosine(" ".join(TEXTS[0]), REFERENCES[0], weights), abs=1e-6)


def test_records_without_a_reference_are_passed_over():
    metric = Consistency()
    metric.update([["Rome is in Italy"], ["Rome"]], ["Rome, Italy", None])
    alone = Consistency()
    alone.update([["Rome is in Italy"]], ["Rome, Italy"])
    assert float(metric.compute()) == float(alone.compute()) > 0


def test_bad_files(tmp_path):
    with pytest.raises(ConfigError, match="idf and vocabulary together"):
        Consistency(idf="idf.npy")
    with pytest.raises(ConfigError, match=r"no file .*missing\.txt"):
        Consistency(corpus=tmp_path / "missing.txt")
    (tmp_path / "latin.txt").write_bytes("größer".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.txt cannot be read as UTF-8 text"):
        Consistency(corpus=tmp_path / "latin.txt")
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    np.save(tmp_path / "idf.npy", np.array([1.0]))
    with pytest.raises(ConfigError, match="no idf vector with its words"):
        Consistency(idf=tmp_path / "idf.npy", vocabulary=tmp_path / "vocab.json")
    np.save(tmp_path / "idf.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ConfigError, match="no idf vector with its words"):
        Consistency(idf=tmp_path / "idf.npy", vocabulary=tmp_path / "vocab.json")


def test_one_wording_and_one_name_are_enough():
    metric = AnswerRate()
    metric.update([["no", "It is the U.S."], ["Romeo"]], [["America", "US"], ["Rome"]])
    metric.update([[" Lima."]], [["Lima"]])
    assert float(metric.compute()) == pytest.approx(2 / 3)


def test_plain_answers_and_lists_of_them_are_one_metric():
    plain, lists = AnswerRate(), AnswerRate()
    answers, expected = [" Rome, of course", "Lund", ""], ["Rome", "Oslo", "Kim"]
    plain.update(answers, expected)
    lists.update([[each] for each in answers], [[each] for each in expected])
    assert float(plain.compute()) == float(lists.compute()) == pytest.approx(1 / 3)
