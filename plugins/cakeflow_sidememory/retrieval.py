"""Retrieval, a control: facts are put before questions, and the model is not edited at all."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, final

import numpy as np
from jaxtyping import Float
from sklearn.feature_extraction.text import TfidfVectorizer
from torchmetrics import Metric

from cakeflow.core import EditModule
from cakeflow.data import EditRequest
from cakeflow.data import join as join_texts
from cakeflow.errors import ConfigError, require_count
from cakeflow.evaluation import Evaluation, scored_prompts
from cakeflow.forward import EditBatch
from cakeflow.journal import EditStep, facts_in_force, request_hash
from cakeflow.metrics import KINDS
from cakeflow.models import LanguageModel
from cakeflow_sidememory.routes import Route

WORD = re.compile(r"\w+")
"""A word: a number or a single letter too."""


class Match(NamedTuple):
    """A text near to a question: its place, and how near it is."""

    place: int
    similarity: float


class Retriever(ABC):
    """A search for the texts that are near to a question.

    Attributes:
        threshold: Least similarity of a text that is taken.
        top: Most texts that are taken.
    """

    threshold: float
    top: int

    @property
    @abstractmethod
    def name(self) -> str:
        """Name with every setting: numbers with different ones are not comparable."""

    @abstractmethod
    def similarities(self, questions: Sequence[str], texts: Sequence[str]) -> Float[np.ndarray, "questions texts"]:
        """Return how near each text is to each question; it depends on no other question."""

    @final
    def search(self, question: str, texts: Sequence[str]) -> list[Match]:
        """Return the texts that are taken for a question, the nearest first, of equal ones the first."""
        near = self.similarities([question], texts)[0] if texts else np.empty(0)
        order = np.argsort(-near, kind="stable")[: self.top]
        return [Match(int(place), float(near[place])) for place in order if near[place] >= self.threshold]


@dataclass(frozen=True)
class TfidfRetriever(Retriever):
    """Cosine of TF-IDF vectors of words, with the weights of the texts that are searched.

    A word that none of them has weighs like one that a single text could have, so that a question about another
    subject is not near merely because the rest of it is (scikit-learn leaves such words out).

    Attributes:
        threshold: Least cosine, from 0 to 1.
        top: Most texts.

    Raises:
        ConfigError: If a setting is out of its range.
    """

    threshold: float = 0.5
    top: int = 1

    def __post_init__(self) -> None:
        require_count("TfidfRetriever.top", self.top, 1)
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"TfidfRetriever.threshold must be from 0 to 1, got {self.threshold}")

    @property
    def name(self) -> str:
        """Name with every setting."""
        return f"tfidf{self.threshold:g}top{self.top}"

    def similarities(self, questions: Sequence[str], texts: Sequence[str]) -> Float[np.ndarray, "questions texts"]:
        """Return the cosine of each question with each text."""
        if not any(WORD.search(text) for text in texts):
            return np.zeros((len(questions), len(texts)))
        vectorizer, vectors = _fitted(tuple(texts))
        words = [vectorizer.build_analyzer()(question) for question in questions]
        known = vectorizer.transform(questions)
        unknown_weight = 1 + np.log(1 + len(texts))  # a word of no text, in scikit-learn's smoothed formula
        others = [_unknown_square(each, vectorizer.vocabulary_) * unknown_weight**2 for each in words]
        squares = np.asarray(known.multiply(known).sum(1))[:, 0] + np.array(others)
        lengths = np.sqrt(np.asarray(vectors.multiply(vectors).sum(1)))[:, 0]
        products = np.asarray((known @ vectors.T).todense())
        cosines: np.ndarray = products / np.maximum(np.sqrt(squares)[:, None] * lengths, 1e-300)
        return cosines


@lru_cache(maxsize=8)
def _fitted(texts: tuple[str, ...]) -> tuple[Any, Any]:
    """Return a vectorizer for some texts, and their vectors."""
    vectorizer = TfidfVectorizer(norm=None, token_pattern=WORD.pattern)
    return vectorizer, vectorizer.fit_transform(texts)


def _unknown_square(words: Sequence[str], vocabulary: Any) -> int:
    """Return the sum of the squared counts of the words that are not in a vocabulary."""
    unknown = [word for word in words if word not in vocabulary]
    return sum(unknown.count(word) ** 2 for word in set(unknown))


@final
class Retrieval(EditModule[EditBatch]):
    """Puts edited facts before the questions of an evaluation that are near to them; the model is not edited.

    A control that every edit has to beat: facts in the context (IKE, arXiv 2305.12740, without its demonstrations),
    found by a retriever. A batch is committed to the journal without any change. Questions of evaluations and of
    ``OutcomeCheck`` are asked with the facts in force that the retriever takes; ``Editor.ask`` and ``editor.model``
    are the model itself, which knows nothing of them, and an export is refused. Of facts with one prompt the last one
    counts; what is undone or rolled back is not put before a question any more.

    Args:
        base: Name or folder of a model, or a ``LanguageModel``.
        retriever: The search; a question is compared with the prompts of the facts.
        template: How facts are put before a question: ``{facts}`` is replaced by them, one sentence each.
        evaluation: What the model is asked.
        metrics: Further metrics of every evaluation.
        record_texts: True: without their texts there is nothing to put before a question.
        private: Whether only their owner can read the run folders that are made.

    Raises:
        ConfigError: If texts are not to be recorded, or the template has no ``{facts}``.
    """

    def __init__(
        self,
        base: str | LanguageModel = "smollm2-135m",
        retriever: Retriever = TfidfRetriever(),
        template: str = "{facts}\n",
        evaluation: Evaluation = Evaluation(),
        metrics: Sequence[Metric] = (),
        record_texts: bool = True,
        private: bool = True,
    ) -> None:
        if not record_texts:
            raise ConfigError(
                "record_texts=False: the facts are put before questions as the journal has them, and it would have "
                "hashes only; leave it True, and keep the run folder private"
            )
        if template.count("{facts}") != 1:
            raise ConfigError(f"template={template!r} needs exactly one {{facts}}, where the facts go")
        super().__init__(base, evaluation, metrics, {}, record_texts=record_texts, private=private)
        self.retriever, self.template = retriever, template

    def settings(self) -> dict[str, Any]:
        """Return all arguments that decide the outcome."""
        parts = {name: repr(getattr(self, name)) for name in ("retriever", "evaluation")}
        return {**parts, "template": self.template}

    @property
    def condition(self) -> str:
        """Names the retriever and its settings."""
        return f"retrieval-{self.retriever.name}"

    def encode(self, requests: Sequence[EditRequest]) -> EditBatch:
        """Take the requests as they are."""
        return EditBatch(requests)

    def prepare(self, batches: Sequence[EditBatch]) -> None:
        """Nothing is measured."""

    def edit(self, batch: EditBatch, step: EditStep) -> None:
        """Change nothing: the journal has the facts."""
        self.log("retrieval/facts", float(len(batch)), batch_size=len(batch))

    def undo(self, batch: EditBatch, step: EditStep) -> None:
        """Change nothing: the journal notes which facts are taken back."""

    def facts(self) -> dict[str, EditRequest]:
        """Return the facts in force by their SHA-256, of those with one prompt the last.

        Raises:
            ConfigError: If the journal was loaded from a run that has hashes of them only.
        """
        pairs = facts_in_force(self.journal)
        if any(not step.requests for step, _ in pairs):
            raise ConfigError(
                "the run has hashes of its facts only (record_texts=False), so that none can be put before a question; "
                "edit them again"
            )
        last = {step.requests[i].text: (step.hashes[i], step.requests[i]) for step, i in pairs}
        return dict(last.values())

    def question(self, prompt: str) -> str:
        """Return a prompt with the facts before it that the retriever takes, the nearest one last."""
        facts = list(self.facts().values())
        matches = self.retriever.search(prompt, [fact.text for fact in facts])
        if not matches:
            return prompt
        sentences = [join_texts(facts[each.place].text, facts[each.place].target_new, facts[each.place].space) + "."
                     for each in reversed(matches)]  # fmt: skip
        return self.template.replace("{facts}", " ".join(sentences)) + prompt

    def ask(self, requests: Sequence[EditRequest]) -> Any:
        """Ask the model about the next requests of an evaluation, with facts before their prompts."""
        return self.evaluation.ask(self.lm, requests, len(self.answers), self.max_bytes, self.question)

    def routes(self, requests: Sequence[EditRequest]) -> list[Route]:
        """Return for all prompts of some requests the similarity to the nearest fact, and whether it is taken.

        Raises:
            ConfigError: If no fact is in force.
        """
        facts, prompts = self.facts(), list(scored_prompts(requests))
        if not facts:
            raise ConfigError("no fact is in force, so that there is nothing to retrieve: edit first")
        names = {name: place for place, name in enumerate(facts, 1)}
        texts = [fact.text for fact in facts.values()]
        near = self.retriever.similarities([each.prompt for each in prompts], texts)
        limit = self.retriever.threshold
        rows = []
        for each, row in zip(prompts, near, strict=True):
            place, kind = int(row.argmax()), KINDS[each.kind]
            decision = place + 1 if row[place] >= limit else 0
            own = 0 if kind == KINDS[2] else names.get(request_hash(requests[each.record]))
            distance = float(row[place])
            rows.append(Route(each.record, kind, each.prompt, self.condition, distance, limit, "above", decision, own))
        return rows
