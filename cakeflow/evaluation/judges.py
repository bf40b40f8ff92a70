"""Judges of free answers: whether an answer says what is expected, by a rule, a function or another model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from cakeflow.data.text import plain, states
from cakeflow.errors import ConfigError, JudgeError
from cakeflow.evaluation.statement import is_stated
from cakeflow.forward.generation import continuations
from cakeflow.models.language import LanguageModel
from cakeflow.models.loading import load_model

TEMPLATE = (
    "Question: {question}\nGold answer: {expected}\nPredicted answer: {answer}\n"
    "Does the predicted answer say the same as the gold answer? Reply with yes or no.\nReply:"
)
"""What a model is asked as a judge, after the grader of WILD ("The Mirage of Model Editing", 2025), shortened."""
VERDICTS = {"yes": 1.0, "correct": 1.0, "true": 1.0, "a": 1.0, "no": 0.0, "incorrect": 0.0, "false": 0.0, "b": 0.0}
"""First word of a model's reply -> what it means."""


class JudgedAnswer(NamedTuple):
    """An answer that is to be judged.

    Attributes:
        question: The prompt, or what the user said.
        expected: Right answer after the edit.
        answer: The model's answer, up to where the protocol cuts it.
        subject: Whom or what the question is about; empty if that is not known.
        chat: Whether it was asked as the user's turn, so that an answer is a sentence of its own.
    """

    question: str
    expected: str
    answer: str
    subject: str = ""
    chat: bool = False


class Judge(ABC):
    """Says of answers whether they are right; subclasses are frozen dataclasses.

    Contract: one number in [0, 1] for each answer, which depends on nothing but this answer.
    """

    @property
    def name(self) -> str:
        """Name of the judge in the id of an evaluation."""
        return type(self).__name__

    @abstractmethod
    def judge(self, answers: Sequence[JudgedAnswer]) -> list[float]:
        """Return 1 for each right answer and 0 for each wrong one.

        Raises:
            JudgeError: If the judge gives something else, naming the answer.
        """


@dataclass(frozen=True)
class ExactMatch(Judge):
    """Right if it is the expected text, up to case, punctuation and articles (SQuAD's normal form).

    Example:
        >>> ExactMatch().judge([JudgedAnswer("Lund is in", "Sweden", each) for each in (" sweden", " the south")])
        [1.0, 0.0]
    """

    def judge(self, answers: Sequence[JudgedAnswer]) -> list[float]:
        """Compare the normal forms."""
        return [float(plain(each.answer) == plain(each.expected)) for each in answers]


@dataclass(frozen=True)
class Containment(Judge):
    """Right if it contains the expected text as whole words.

    Example:
        >>> Containment().judge([JudgedAnswer("Lund is in", "Sweden", " the south of Sweden")])
        [1.0]
    """

    def judge(self, answers: Sequence[JudgedAnswer]) -> list[float]:
        """Look for the expected words."""
        return [float(states(each.answer, each.expected)) for each in answers]


@dataclass(frozen=True)
class Stated(Judge):
    """Right if it states the expected text as a careful reader would take it (``cakeflow.evaluation.statement``).

    Contained as whole words, up to case, punctuation, articles, accents and numbers in words; neither denied ("not
    Rome") nor one of two ("Rome or Oslo"); in a completion not in an aside ("Oslo, although Rome is warmer"); in a chat
    said of the subject that was asked about: a model that was edited too hard answers "The mother tongue of Vladimir
    Putin is Russian" when asked for Verdi's.

    Example:
        >>> Stated().judge([JudgedAnswer("It is in", "Peru", each) for each in (" Peru, near Lima", " not Peru")])
        [1.0, 0.0]
    """

    def judge(self, answers: Sequence[JudgedAnswer]) -> list[float]:
        """Apply the rules."""
        return [float(is_stated(each.answer, each.expected, each.subject, chat=each.chat)) for each in answers]


@dataclass(frozen=True)
class CallableJudge(Judge):
    """Asks a function of Python, such as a client of a served model.

    Attributes:
        function: Gets question, expected answer and answer; returns True, False or a number in [0, 1].
        label: Name in the id of an evaluation; by default the function's.
    """

    function: Callable[[str, str, str], float | bool]
    label: str = ""

    @property
    def name(self) -> str:
        """The label, or the function's name."""
        return self.label or str(getattr(self.function, "__name__", type(self.function).__name__))

    def judge(self, answers: Sequence[JudgedAnswer]) -> list[float]:
        """Call the function once for each answer."""
        return [_checked(self.name, each, self.function(each.question, each.expected, each.answer)) for each in answers]


@dataclass(frozen=True)
class ModelJudge(Judge):
    """Asks a text-generation model, whose reply begins with yes or no.

    A judge should be another model than the one that is edited, and a much larger one.

    Attributes:
        model: An embedded name, hub id, folder or GGUF file; loaded when it first judges.
        template: The question, with ``{question}``, ``{expected}`` and ``{answer}``; asked as the user's turn where the
            model has a chat template.
        tokens: Most tokens of a reply.

    Raises:
        ConfigError: If the template lacks one of its three places, or there are no tokens.
    """

    model: str
    template: str = TEMPLATE
    tokens: int = 4

    def __post_init__(self) -> None:
        lacking = [each for each in ("{question}", "{expected}", "{answer}") if each not in self.template]
        if lacking or self.tokens < 1:
            raise ConfigError(
                f"a judge's template needs {{question}}, {{expected}} and {{answer}}, and 1 token or more; this one "
                f"lacks {lacking}, tokens = {self.tokens}"
            )

    @property
    def name(self) -> str:
        """The class with the model's name."""
        return f"ModelJudge({self.model})"

    def judge(self, answers: Sequence[JudgedAnswer]) -> list[float]:
        """Ask the model about every answer, greedily."""
        return verdicts(self._lm, answers, self.template, self.tokens) if answers else []

    @cached_property
    def _lm(self) -> LanguageModel:
        return load_model(self.model)


def verdicts(
    lm: LanguageModel, answers: Sequence[JudgedAnswer], template: str = TEMPLATE, tokens: int = 4
) -> list[float]:
    """Return a model's verdict on each answer; see ``ModelJudge``.

    Args:
        lm: The model that judges.
        answers: The answers.
        template: The question.
        tokens: Most tokens of a reply.

    Raises:
        JudgeError: If a reply does not begin with yes or no.
    """
    names = ("question", "expected", "answer")
    texts = [_filled(template, {name: getattr(each, name).strip() for name in names}) for each in answers]
    replies = continuations(lm, [lm.user_turn(text) if lm.chats else text for text in texts], tokens)
    words = [(plain(reply).split() or [""])[0] for reply in replies]
    for each, word, reply in zip(answers, words, replies, strict=True):
        if word not in VERDICTS:
            raise _nonsense(f"the model {lm.name!r}", each, reply, "yes or no")
    return [VERDICTS[word] for word in words]


def as_judge(judge: Any) -> Judge:
    """Return a judge as one: itself, or a function of question, expected answer and answer.

    Raises:
        ConfigError: If it is neither.
    """
    if isinstance(judge, Judge):
        return judge
    if callable(judge) and not isinstance(judge, type):
        return CallableJudge(judge)
    raise ConfigError(
        f"a judge is a Judge or a function of question, expected answer and answer; got {judge!r}: give "
        "ExactMatch(), or ModelJudge(NAME) for a model"
    )


def agreement(verdict: Sequence[float], labels: Sequence[bool]) -> float:
    """Return the share of answers on which a judge says what their labels say; from 0.5 on it says right.

    Example:
        >>> agreement([1.0, 0.0, 0.2, 1.0], [True, False, True, True])
        0.75
    """
    pairs = zip(verdict, labels, strict=True)
    return sum((value >= 0.5) == label for value, label in pairs) / len(labels)


def _filled(template: str, values: dict[str, str]) -> str:
    """Fill a template in one pass, so that no text is read as a place."""
    parts = [template]
    for name in values:
        parts = [each for part in parts for each in _around(part, "{" + name + "}")]
    return "".join(values.get(part[1:-1], part) if part.startswith("{") else part for part in parts)


def _around(part: str, place: str) -> list[str]:
    before, mark, after = part.partition(place)
    return [before, mark, *_around(after, place)] if mark else [part]


def _checked(name: str, answer: JudgedAnswer, value: Any) -> float:
    if not isinstance(value, (bool, int, float)) or not 0 <= value <= 1:
        raise _nonsense(name, answer, value, "True, False or a number from 0 to 1")
    return float(value)


def _nonsense(name: str, answer: JudgedAnswer, value: Any, need: str) -> JudgeError:
    return JudgeError(
        f"{name} says {value!r} of the answer {answer.answer[:60]!r} to {answer.question[:60]!r}; a judge has to say "
        f"{need}: use a larger model, another template, or ExactMatch()"
    )
