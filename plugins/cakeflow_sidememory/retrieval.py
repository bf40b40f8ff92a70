"""Retrieval, a control: facts are put before questions, and the model is not edited at all."""

from __future__ import annotations

import hashlib
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
TEMPLATE = "New fact: {facts}\nPrompt: "
"""How IKE (arXiv 2305.12740) puts a fact before a question."""


class Match(NamedTuple):
    """A fact near to a question: its place, and how near it is."""

    place: int
    similarity: float


class Retriever(ABC):
    """A search for the facts that are near to a question.

    Attributes:
        threshold: Least similarity of a fact that is taken.
        top: Most facts that are taken.
    """

    threshold: float
    top: int

    @property
    @abstractmethod
    def name(self) -> str:
        """Name with every setting: numbers with different ones are not comparable."""

    @abstractmethod
    def similarities(
        self, questions: Sequence[str], facts: Sequence[EditRequest]
    ) -> Float[np.ndarray, "questions facts"]:
        """Return how near each fact is to each question; it depends on no other question, and on no target."""

    @final
    def search(self, question: str, facts: Sequence[EditRequest]) -> list[Match]:
        """Return the facts that are taken for a question, the nearest first, of equal ones the first."""
        near = self.similarities([question], facts)[0] if facts else np.empty(0)
        order = np.argsort(-near, kind="stable")[: self.top]
        return [Match(int(place), float(near[place])) for place in order if near[place] >= self.threshold]


@dataclass(frozen=True)
class TfidfRetriever(Retriever):
    """Cosine of TF-IDF vectors of question and prompt, for facts whose subject the question names.

    The similarity is ``share * (1 + cosine) / 2``, where ``share`` is the part of the subject's words, by weight, that
    the question has. By the cosine alone, another subject's question of the same wording is nearer than a paraphrase:
    of 100 built-in facts, 15 % of the paraphrases and 62 % of the neighbors are at .5 or above.

    Words weigh by the prompts of the facts. One that none of them has weighs like one that a single prompt could have;
    scikit-learn leaves it out, as if the question did not have it.

    Attributes:
        threshold: Least similarity, from 0 to 1.
        top: Most facts.
        subjects: Whether the subject counts; else the similarity is the cosine.

    Raises:
        ConfigError: If a setting is out of its range.
    """

    threshold: float = 0.5
    top: int = 1
    subjects: bool = True

    def __post_init__(self) -> None:
        require_count("TfidfRetriever.top", self.top, 1)
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"TfidfRetriever.threshold must be from 0 to 1, got {self.threshold}")

    @property
    def name(self) -> str:
        """Name with every setting."""
        return f"tfidf{self.threshold:g}top{self.top}{'' if self.subjects else 'cosine'}"

    def similarities(
        self, questions: Sequence[str], facts: Sequence[EditRequest]
    ) -> Float[np.ndarray, "questions facts"]:
        """Return the similarity of each question with each fact."""
        if not any(WORD.search(fact.text) for fact in facts):
            return np.zeros((len(questions), len(facts)))
        index = _index(tuple((fact.text, fact.subject) for fact in facts))
        known = index.vectorizer.transform(questions)
        words = [index.vectorizer.build_analyzer()(question) for question in questions]
        others = [_unknown_square(each, index.vectorizer.vocabulary_) for each in words]
        weight = 1 + np.log(1 + len(facts))  # of a word in no prompt, by scikit-learn's smoothed formula
        squares = np.asarray(known.multiply(known).sum(1))[:, 0] + weight**2 * np.array(others)
        lengths = np.sqrt(squares)[:, None] * np.sqrt(np.asarray(index.texts.multiply(index.texts).sum(1)))[:, 0]
        cosines: np.ndarray = (known @ index.texts.T).toarray() / np.maximum(lengths, 1e-300)
        if not self.subjects:
            return cosines
        totals = np.asarray(index.subjects.sum(1))[:, 0]
        shares = ((known > 0) @ index.subjects.T).toarray() / np.maximum(totals, 1e-300)
        similarities: np.ndarray = shares * (1 + cosines) / 2
        return similarities


class _Index(NamedTuple):
    """Vectors of some facts: of their prompts, and the weights of the words of their subjects."""

    vectorizer: Any
    texts: Any
    subjects: Any


@lru_cache(maxsize=8)
def _index(facts: tuple[tuple[str, str], ...]) -> _Index:
    """Return the vectors of facts, each a prompt and its subject."""
    vectorizer = TfidfVectorizer(norm=None, token_pattern=WORD.pattern)
    vectorizer.fit([f"{text} {subject}" for text, subject in facts])
    texts, subjects = (vectorizer.transform(column) for column in zip(*facts, strict=True))
    return _Index(vectorizer, texts, (subjects > 0).multiply(vectorizer.idf_).tocsr())


def _unknown_square(words: Sequence[str], vocabulary: Any) -> int:
    """Return the sum of the squared counts of the words that are not in a vocabulary."""
    unknown = [word for word in words if word not in vocabulary]
    return sum(unknown.count(word) ** 2 for word in set(unknown))


@final
class FactsInContext(EditModule[EditBatch]):
    """Puts edited facts before the questions of an evaluation that are near to them; the model is not edited.

    A control that every edit has to beat: facts in the context (IKE, arXiv 2305.12740, without its demonstrations),
    found by a retriever. A batch is committed to the journal without any change. Questions of evaluations and of
    ``OutcomeCheck`` are asked with the facts in force that the retriever takes; ``Editor.ask`` and ``editor.model``
    are the model itself, which knows nothing of them, and an export is refused. Of facts with one prompt and relation
    the last one counts; what is undone or rolled back is not put before a question any more.

    Args:
        base: Name or folder of a model, or a ``LanguageModel``.
        retriever: The search for the facts that a question is about.
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
        template: str = TEMPLATE,
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
        """Names the retriever and its settings, and a template that is not IKE's, by its hash."""
        other = self.template != TEMPLATE
        words = f"-template{hashlib.sha256(self.template.encode()).hexdigest()[:6]}" if other else ""
        return f"retrieval-{self.retriever.name}{words}"

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
        """Return the facts in force by their SHA-256, of those with one prompt and relation the last.

        Raises:
            ConfigError: If the journal was loaded from a run that has hashes of them only.
        """
        pairs = facts_in_force(self.journal)
        if any(not step.requests for step, _ in pairs):
            raise ConfigError(
                "the run has hashes of its facts only (record_texts=False), so that none can be put before a question; "
                "edit them again"
            )
        last = {}
        for step, i in pairs:
            request = step.requests[i]
            last[request.text, request.relation] = step.hashes[i], request
        return dict(last.values())

    def question(self, prompt: str) -> str:
        """Return a prompt with the facts before it that the retriever takes, the nearest one last."""
        facts = list(self.facts().values())
        matches = self.retriever.search(prompt, facts)
        if not matches:
            return prompt
        sentences = [join_texts(facts[each.place].text, facts[each.place].target_new, facts[each.place].space) + "."
                     for each in reversed(matches)]  # fmt: skip
        return self.template.replace("{facts}", " ".join(sentences)) + prompt

    def ask(self, requests: Sequence[EditRequest]) -> Any:
        """Ask the model about the next requests of an evaluation, with facts before their prompts."""
        return self.evaluation.ask(self.lm, requests, self.first, self.max_bytes, self.question)

    def routes(self, requests: Sequence[EditRequest]) -> list[Route]:
        """Return for all prompts of some requests the similarity to the nearest fact, and whether it is taken.

        Raises:
            ConfigError: If no fact is in force.
        """
        facts, prompts = self.facts(), list(scored_prompts(requests))
        if not facts:
            raise ConfigError("no fact is in force, so that there is nothing to retrieve: edit first")
        names = {name: place for place, name in enumerate(facts, 1)}
        near = self.retriever.similarities([each.prompt for each in prompts], list(facts.values()))
        limit = self.retriever.threshold
        rows = []
        for each, row in zip(prompts, near, strict=True):
            place, kind = int(row.argmax()), KINDS[each.kind]
            decision = place + 1 if row[place] >= limit else 0
            own = 0 if kind == KINDS[2] else names.get(request_hash(requests[each.record]))
            distance = float(row[place])
            rows.append(Route(each.record, kind, each.prompt, self.condition, distance, limit, "above", decision, own))
        return rows
