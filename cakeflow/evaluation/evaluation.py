"""Evaluation of edits: the prompts a model gets, its answers, and the metrics that follow from them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torchmetrics import Metric, MetricCollection
from torchmetrics.metric import jit_distributed_available

from cakeflow import ranks
from cakeflow.data.request import EditRequest
from cakeflow.data.review import check_fields
from cakeflow.data.text import occurrences, until_stop
from cakeflow.errors import ConfigError, RequestWarning, listed, require_choice, require_count
from cakeflow.evaluation.judges import Containment, ExactMatch, Judge, JudgedAnswer, Stated, as_judge
from cakeflow.evaluation.outcome import free_answers
from cakeflow.evaluation.protocols import CUTS, WILD_TOKENS, Protocol
from cakeflow.evaluation.scoring import PromptScores, ScoredPrompt, check_records, score_records, scored_prompts
from cakeflow.forward.generation import continuations
from cakeflow.journal.schema import EvaluatedRequest, Generation, PromptAnswer
from cakeflow.metrics import KINDS, Consistency, EditScore, Efficacy, Fluency, Generalization, Specificity
from cakeflow.models.language import LanguageModel
from cakeflow.models.loading import load_model
from cakeflow.storage.cache import content_key

COLUMNS = {
    "expected_logprob": "expected",
    "rival_logprob": "rival",
    "correct": "correct",
    "tokens": "tokens",
    "answered": "answered",
    "contained": "contained",
    "judged": "judged",
}
"""Field of ``PromptAnswer`` -> field of ``PromptScores``; None where it is nan."""
VERSIONS = {"clean": "v2", "official": "v1", "wild": "v1", "wild_official": "v1"}
"""Protocol -> its version; in version 1 of ``clean`` a space stood before every continuation."""


@dataclass(frozen=True, eq=False)
class Answers:
    """A model's answers to the prompts of some records.

    Attributes:
        records: The records.
        scores: Scores of their prompts.
        texts: Free texts of each record, prompts included; empty for a record that has none or is not due for any.
        answers: The free answer to each prompt, up to where the protocol cuts it; empty without free answers.
    """

    records: Sequence[EditRequest]
    scores: PromptScores
    texts: Sequence[Sequence[str]]
    answers: Sequence[str] = ()

    def fields(self) -> dict[str, Any]:
        """Return all that a metric can use, by the names of the arguments of its ``update``."""
        return {**vars(self.scores), "texts": self.texts, "references": [each.reference for each in self.records]}

    def rows(self, first: int = 0) -> Iterator[EvaluatedRequest]:
        """Yield the answers record by record; ``first`` is the number of the first record."""
        columns = {name: vars(self.scores)[field].tolist() for name, field in COLUMNS.items()}
        prompts: list[list[PromptAnswer]] = [[] for _ in self.records]
        for place, (record, kind, prompt, expected, rival) in enumerate(scored_prompts(self.records)):
            numbers: dict[str, Any] = {
                name: None if math.isnan(column[place]) else column[place] for name, column in columns.items()
            }
            numbers["answer"] = self.answers[place] if self.answers else None
            answer = PromptAnswer(kind=KINDS[kind], prompt=prompt, expected=expected, rival=rival, **numbers)
            prompts[record].append(answer)
        names = ("case_id", "prompt", "subject", "target_new", "target_true", "relation", "space")
        for index, (request, texts) in enumerate(zip(self.records, self.texts, strict=True)):
            pairs = zip(free_prompts(request), texts, strict=False)
            yield EvaluatedRequest(
                index=first + index,
                **{name: getattr(request, name) for name in names},
                prompts=prompts[index],
                generations=[Generation(prompt=prompt, text=text[len(prompt) :]) for prompt, text in pairs],
            )


@dataclass(frozen=True)
class Evaluation:
    """Settings of an evaluation.

    Attributes:
        protocol: Tokenisation and scoring of continuations: ``clean``, or ``official`` to compare with published
            tables; ``wild`` and ``wild_official`` score as ``clean`` does and, beside it, let the model answer by
            itself (``cakeflow.evaluation.protocols``).
        answer_tokens: Length of the free-running answer to every prompt, which the ``answer`` forms of the metrics
            need; 0 for none, or for 32 in the protocols of free answers. Teacher forcing alone flatters an editor ("The
            Mirage of Model Editing", 2025).
        chat: Whether prompts are free-answered as the user's turn in a chat.
        judge: What judges free answers, in the ``judged`` forms of the metrics: a ``Judge``, or a function of question,
            expected answer and answer. By default ``Stated`` in the protocols of free answers, and none elsewhere.
            ``ExactMatch`` is what the ``answer`` forms are, so that it adds none.
        texts_every: Interval between the records for which free texts are generated, for ``Fluency`` and
            ``Consistency`` (``generation_test_interval`` of the official code); 0 for none.
        text_tokens: Length of a free text, prompt included.
        top_k: Number of most likely tokens among which free texts are sampled; 1 is greedy.
        seed: Seed of the sampling.

    Raises:
        ConfigError: If a value is out of range.
    """

    protocol: Protocol = "clean"
    answer_tokens: int = 0
    texts_every: int = 0
    text_tokens: int = 100
    top_k: int = 5
    seed: int = 0
    chat: bool = False
    judge: Judge | None = None

    def __post_init__(self) -> None:
        require_choice("protocol", self.protocol, Protocol)
        default = Stated() if self.is_wild else ExactMatch()
        object.__setattr__(self, "judge", default if self.judge is None else as_judge(self.judge))
        for name, least in (("answer_tokens", 0), ("texts_every", 0), ("text_tokens", 2), ("top_k", 1)):
            require_count(f"evaluation.{name}", getattr(self, name), least)
        if (self.chat or self.has_judge) and not self.free_tokens:
            raise ConfigError("evaluation.chat and evaluation.judge need free answers: set protocol to wild")

    @property
    def is_wild(self) -> bool:
        """True in the protocols of free answers."""
        return self.protocol.startswith("wild")

    @property
    def free_tokens(self) -> int:
        """Most tokens of a free answer; 0 if there is none."""
        return self.answer_tokens or (WILD_TOKENS if self.is_wild else 0)

    @property
    def has_judge(self) -> bool:
        """True if a judge has a say beside the exact match."""
        return self.judge != ExactMatch()

    @property
    def id(self) -> str:
        """Name of everything that decides the numbers; numbers under different ids are not comparable."""
        answers = f"+answers{self.free_tokens}v2" if self.free_tokens else ""
        answers += ("+chat" if self.chat else "") + (f"+{as_judge(self.judge).name}" if self.has_judge else "")
        texts = f"+texts{self.text_tokens}k{self.top_k}s{self.seed}" if self.texts_every else ""
        return f"{self.protocol}-{VERSIONS[self.protocol]}{answers}{texts}"

    def metrics(self, further: Sequence[Metric] = ()) -> MetricCollection:
        """Return every metric that these settings allow, by its name in tables and logs, each over what it is given.

        Args:
            further: Further metrics, named by their class.

        Raises:
            ConfigError: If two have one name.
        """
        further_forms = {"answer": self.free_tokens, "contained": self.is_wild, "judged": self.has_judge}
        forms = ["probability", "exact", "tokens", *(form for form, due in further_forms.items() if due)]
        metrics: dict[str, Metric | MetricCollection] = {}
        for form in forms:
            ending = "" if form == "probability" else f"_{form}"
            metrics |= {type(m).__name__.lower() + ending: m for m in _rates(form)}
            if form == "probability":
                metrics["editscore"] = EditScore()
        if self.texts_every:
            metrics |= {"fluency": Fluency(), "consistency": Consistency()}
        for metric in further:
            name = type(metric).__name__.lower()
            if name in metrics and not isinstance(metric, (Fluency, Consistency)):
                raise ConfigError(
                    f"there is a metric {name!r} already; give {type(metric).__name__} another class name"
                )
            metrics[name] = metric
        collection = MetricCollection(metrics, compute_groups=False)
        for each in collection.modules():
            if isinstance(each, Metric):
                each.distributed_available_fn = _are_apart
        return collection

    def ask(
        self,
        lm: LanguageModel,
        records: Sequence[EditRequest],
        first: int = 0,
        max_bytes: float | None = None,
        question: Callable[[str], str] | None = None,
    ) -> Answers:
        """Return a model's answers to all prompts of some records.

        Args:
            lm: The model.
            records: The records, probes included.
            first: Number of the first record among all.
            max_bytes: Most bytes beyond the model.
            question: Function that returns a prompt as the model gets it, which ends with the prompt; metrics and
                judges see the prompts themselves.

        Raises:
            ConfigError: If the longest text does not fit ``max_bytes``, or there is to be a chat and no template.
            JudgeError: If the judge gives no verdict.
        """
        put = question or str
        asked = records if question is None else [_put(record, question) for record in records]
        scores = score_records(lm, asked, self.protocol, max_bytes=max_bytes)
        answers: list[str] = []
        if self.free_tokens:
            prompts = list(scored_prompts(records))
            texts, cut = [put(each.prompt) for each in prompts], CUTS.get(self.protocol, until_stop)
            answers = free_answers(lm, texts, self.free_tokens, self.chat, max_bytes, cut)
            scores = replace(scores, **self._verdicts(records, prompts, answers))
        return Answers(records, scores, self._texts(lm, records, first, max_bytes, put), answers)

    def check(self, lm: LanguageModel) -> None:
        """Check that a model can be asked in this way, before the expensive work.

        Raises:
            ConfigError: If there is to be a chat, and the tokenizer has no chat template.
        """
        if self.chat:
            lm.user_turn("Hello")

    def _verdicts(
        self, records: Sequence[EditRequest], prompts: Sequence[ScoredPrompt], answers: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """Return what the rules and the judge say of free answers, by the field of ``PromptScores``."""
        items = [
            JudgedAnswer(each.prompt, each.expected, text, _subject(records[each.record], each.prompt), self.chat)
            for each, text in zip(prompts, answers, strict=True)
        ]
        judges: dict[str, Judge] = {"answered": ExactMatch()} | ({"contained": Containment()} if self.is_wild else {})
        judges |= {"judged": as_judge(self.judge)} if self.has_judge else {}
        return {name: torch.tensor(judge.judge(items)) for name, judge in judges.items()}

    def _texts(
        self,
        lm: LanguageModel,
        records: Sequence[EditRequest],
        first: int,
        max_bytes: float | None,
        put: Callable[[str], str],
    ) -> list[list[str]]:
        due = [bool(self.texts_every) and (first + i) % self.texts_every == 0 for i in range(len(records))]
        prompts = [free_prompts(record) if now else [] for record, now in zip(records, due, strict=True)]
        flat = [put(prompt) for each in prompts for prompt in each]
        sampling: dict[str, Any] = {"total": True, "top_k": self.top_k, "seed": self.seed, "max_bytes": max_bytes}
        texts = iter(continuations(lm, flat, self.text_tokens, **sampling))
        return [[prompt + next(texts) for prompt in each] for each in prompts]


def check_texts(rows: Sequence[EvaluatedRequest]) -> None:
    """Require that the unedited model writes something, before the expensive work.

    Args:
        rows: Answers of the unedited model.

    Raises:
        ConfigError: If there are free texts, and every one of them is blank.
    """
    texts = [each.text for row in rows for each in row.generations]
    if texts and not any(text.strip() for text in texts):
        raise ConfigError(
            f"the model wrote nothing after any of {len(texts)} prompts, so its texts say nothing of an edit; look at "
            "the end-of-text token of its generation config, or set evaluation.texts_every to 0"
        )


def _are_apart() -> bool:
    """Return whether there are processes with answers of their own; ranks that work together have all of them."""
    return not ranks.are_joined() and bool(jit_distributed_available())


def warn_of_known(lm: LanguageModel, requests: Sequence[EditRequest], max_bytes: float | None = None) -> None:
    """Warn of requests whose target the model gives already: there is nothing to edit in them.

    Args:
        lm: The model, before their edit.
        requests: The requests of a run, in the order of the edits.
        max_bytes: Most bytes beyond the model.

    Raises:
        RequestError: If the model cannot read one of them.
    """
    bare = [replace(request, probes=(), target_true=None) for request in requests]
    correct = score_records(lm, bare, max_bytes=max_bytes).correct.tolist() if bare else []
    if indices := [i for i, each in enumerate(correct) if each]:
        warnings.warn(
            f"records whose target_new the model gives already, before any edit: {listed(indices)} (numbered from 0, "
            f"in the order of the edits), {len(indices)} of {len(bare)}; there is nothing to edit in them, leave them "
            "out or count them apart",
            RequestWarning,
            stacklevel=3,
        )


def free_prompts(record: EditRequest) -> list[str]:
    """Return the prompts of a record from which free texts start."""
    return [probe.prompt for probe in record.probes if probe.kind == "generation"]


def _put(record: EditRequest, question: Callable[[str], str]) -> EditRequest:
    """Return a record with its prompts as the model gets them."""
    probes = tuple(replace(probe, prompt=question(probe.prompt)) for probe in record.probes)
    return replace(record, prompt="{}", subject=question(record.text), probes=probes)


def _subject(record: EditRequest, prompt: str) -> str:
    """Return the record's subject if a prompt is about it, else nothing."""
    return record.subject if occurrences(prompt, record.subject) else ""


def _rates(form: Any) -> tuple[Metric, ...]:
    return Efficacy(form), Generalization(form), Specificity(form)


class Questions:
    """The part of an edit module that depends on the kind of the model: how it is loaded, asked and checked.

    A method for another kind of model, such as classifiers of images, overrides ``load``, ``check``, ``ask`` and
    ``warn_of_known``; one that puts something beside the model overrides ``condition`` and ``question``.

    Attributes:
        lm: The model.
        evaluation: What the model is asked.
        metrics: Metrics of every evaluation.
        answers: The answers of every request in the last evaluation.
        max_bytes: Most bytes beyond the model that edits and evaluations may take; None for no limit.
        first: Number of the first request that ``ask`` gets, among those of the evaluation.
        unedited: Answers of unedited models, which modules of one model may share; None keeps none.
    """

    lm: LanguageModel
    unedited: MutableMapping[str, Any] | None = None
    evaluation: Evaluation
    metrics: MetricCollection
    answers: list[EvaluatedRequest]
    max_bytes: float | None = None
    first: int = 0
    _base: Any
    _loading: dict[str, Any]
    _requested: set[str]

    @property
    def condition(self) -> str:
        """Name of what ``question`` puts before prompts, so that the answers are not the model's alone; or nothing."""
        return ""

    @property
    def protocol(self) -> str:
        """Name of everything that decides the numbers; numbers under different ones are not comparable."""
        return "+".join(filter(None, (self.evaluation.id, self.condition)))

    def question(self, prompt: str) -> str:
        """Return a prompt as the model gets it in evaluations: it ends with the prompt, and is just that by default."""
        return prompt

    def load(self) -> Any:
        """Load the model that was named."""
        return load_model(str(self._base), **self._loading)

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Check that the metrics can judge these requests, and that the model can read them.

        Raises:
            ConfigError: If a metric that the user named can judge none of them.
            RequestError: If a text is too long, or a target has no token.
        """
        needs = {name: getattr(metric, "needs", ()) for name, metric in self.metrics.items()}
        check_fields(requests, needs, self._requested)
        check_records(self.lm, requests)
        self.evaluation.check(self.lm)

    def ask(self, requests: Sequence[EditRequest]) -> Any:
        """Ask the model about the next requests of an evaluation; returns their ``evaluation.Answers``."""
        return self.evaluation.ask(self.lm, requests, self.first, self.max_bytes)

    def _answers_of(self, first: int, requests: Sequence[EditRequest], fingerprint: str) -> Any:
        """Return ``ask(requests)``, from ``unedited`` where a module of the same unedited model asked the same.

        Args:
            first: Number of the first request in the evaluation.
            requests: The requests.
            fingerprint: SHA-256 of the model if it is unedited, else empty.
        """
        self.first = first
        if self.unedited is None or not fingerprint:
            return self.ask(requests)
        key = content_key(fingerprint, self.protocol, first, list(map(repr, requests)))
        if key not in self.unedited:
            self.unedited[key] = self.ask(requests)
        return self.unedited[key]

    def warn_of_known(self, requests: Sequence[EditRequest]) -> None:
        """Warn of requests whose target the model gives already."""
        warn_of_known(self.lm, requests, self.max_bytes)
