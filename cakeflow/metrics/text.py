"""Metrics of generated texts: fluency and consistency (ROME, section 3.4 and appendix D), and free answers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cakeflow.data.builtin import builtin_facts
from cakeflow.data.files import read_text
from cakeflow.data.text import states
from cakeflow.errors import ConfigError
from cakeflow.metrics.mean import Mean

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

WEIGHTS = {2: 2 / 3, 3: 4 / 3}
"""n -> weight of the entropy of n-grams in the official code, which takes their mean, not their sum."""


def ngram_entropy(text: str, n: int) -> float:
    """Compute the entropy in bits of the frequencies of a text's word n-grams; 0 if it has none.

    Example:
        >>> ngram_entropy("to be or not to be", 2)  # five bigrams, "to be" twice
        1.9219280948873623
    """
    from nltk.tokenize import NLTKWordTokenizer  # takes long, and few runs have texts

    words = NLTKWordTokenizer().tokenize(text)
    counts = np.array(list(Counter(zip(*(words[i:] for i in range(n)), strict=False)).values()), dtype=np.float64)
    shares = counts / max(1.0, counts.sum())
    return float(-(shares * np.log2(shares)).sum())


def fluency(text: str) -> float:
    """Compute the weighted mean of bigram and trigram entropies, as the official code does (tables show it times 100).

    CAKE's equation 49 prints the sum with the opposite sign. Words are split by NLTK's word tokenizer over
    the whole text, which needs no download; the official code splits sentences first, so that a full stop inside a text
    is a word of its own there.
    """
    return float(np.mean([weight * ngram_entropy(text, n) for n, weight in WEIGHTS.items()]))


class Fluency(Mean):
    """Mean entropy of word n-grams of free texts about the subjects; repetition lowers it (GE).

    Example:
        >>> metric = Fluency()
        >>> metric.update([["Lund is a city of Sweden .", "Lund , Lund , Lund , Lund"]])
        >>> round(float(metric.compute()), 3)
        1.695
    """

    plot_upper_bound = None
    needs = ("generation",)

    def update(self, texts: Sequence[Sequence[str]]) -> None:
        """Add the free texts of some records, prompts included."""
        self.add(float(np.mean([fluency(text) for text in each])) for each in texts if each)


class Consistency(Mean):
    """Cosine of the TF-IDF vectors of generated texts about a subject and of texts about its new target (RS).

    Args:
        idf: ``.npy`` file with the official inverse document frequencies, with ``vocabulary``.
        vocabulary: JSON file, word -> index in ``idf``.
        corpus: File of texts, one a line, from which both are counted otherwise; by default the reference texts of
            the built-in facts.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Raises:
        ConfigError: If only one of ``idf`` and ``vocabulary`` is set, they do not fit, or a file is missing or broken.

    Example:
        >>> metric = Consistency()
        >>> metric.update([["He was born in Rome, the capital of Italy."]], ["Rome is the capital of Italy."])
        >>> 0.5 < float(metric.compute()) < 1
        True
    """

    needs = ("generation", "reference")

    def __init__(
        self,
        idf: str | Path | None = None,
        vocabulary: str | Path | None = None,
        corpus: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if (idf is None) != (vocabulary is None):
            raise ConfigError("Consistency needs idf and vocabulary together, or neither")
        for path in (idf, vocabulary, corpus):
            if path is not None and not Path(path).is_file():
                raise ConfigError(f"Consistency: no file {str(path)!r}")
        if idf is not None and vocabulary is not None:
            self.vectorizer = _with_frequencies(Path(idf), Path(vocabulary))
        elif corpus is not None:
            self.vectorizer = _vectorizer().fit(read_text(Path(corpus)).splitlines())
        else:
            self.vectorizer = _vectorizer().fit([str(fact.reference) for fact in builtin_facts()])

    def update(self, texts: Sequence[Sequence[str]], references: Sequence[str | None]) -> None:
        """Add the free texts of some records, and the text about each record's new target.

        Records without texts or without a reference are ignored.
        """
        pairs = zip(texts, references, strict=True)
        self.add(self._similarity(" ".join(each), reference) for each, reference in pairs if each and reference)

    def _similarity(self, text: str, reference: str) -> float:
        """Compute the cosine of two texts; 0 if one has no word of the vocabulary."""
        first, second = self.vectorizer.transform([text, reference])  # rows of norm 1 or 0
        return float(first.multiply(second).sum())


class AnswerRate(Mean):
    """Share of questions whose free answer contains an expected name as whole words.

    Teacher forcing flatters an editor ("The Mirage of Model Editing", 2025); this judges what a reader would see. Of a
    question in several wordings, or with several right names, one of each is enough (MQuAKE, section 5.1).

    Example:
        >>> metric = AnswerRate()
        >>> metric.update([" Lyon, a city in France", " the city of Paris"], ["Lyon", "Rome"])
        >>> metric.update([["I do not know", "It is the USA"], ["Peru"]], [["America", "USA"], ["Chile"]])
        >>> metric.compute()
        tensor(0.5000)
    """

    def update(self, answers: Sequence[str | Sequence[str]], expected: Sequence[str | Sequence[str]]) -> None:
        """Add questions: the answer to each, or those to its wordings, and the name or names that are right."""
        self.add(
            any(states(text, name) for text in _listed(texts) for name in _listed(names))
            for texts, names in zip(answers, expected, strict=True)
        )


def _listed(texts: str | Sequence[str]) -> Sequence[str]:
    return [texts] if isinstance(texts, str) else texts


def _vectorizer(vocabulary: Any = None) -> TfidfVectorizer:
    from sklearn.feature_extraction.text import TfidfVectorizer  # takes a second, and few runs have texts

    return TfidfVectorizer(vocabulary=vocabulary)


def _with_frequencies(idf: Path, vocabulary: Path) -> TfidfVectorizer:
    """Build a vectorizer from stored frequencies."""
    try:
        words, weights = json.loads(read_text(vocabulary)), np.load(idf, allow_pickle=False)
        vectorizer = _vectorizer(words)
        vectorizer.idf_ = weights.ravel()
    except ValueError as error:
        raise ConfigError(f"Consistency: {idf} and {vocabulary} are no idf vector with its words: {error}") from error
    return vectorizer
