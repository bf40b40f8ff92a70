"""Metrics of answers that several edits must give together: SR-S, SR-1, GSR and LSR (A3E's names).

No code for them is public, so these are definitions of ours. A question has *groups* of answers: one group of all
answers to one question, whose order does not matter, or one group for each of several questions in one prompt, in
their order. An answer is compared as words: capitals, and the spaces, commas and brackets between its words, make no
difference, so that "AlexanderStadler" is "Alexander Stadler".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import regex
from torchmetrics.functional.text.rouge import rouge_score

from cakeflow.errors import ConfigError
from cakeflow.metrics import Mean

_BETWEEN = r"(?:[\s\p{P}\p{S}]|\band\b)*?"  # as few as possible: an answer may begin with one
"""Signs and words that may stand between two answers."""
_INSIDE = r"[\s,()\[\]]*"
"""Signs that may stand between the words of an answer."""

Groups = Sequence[Sequence[str]]
"""Answers of each question of a prompt."""


def answer_pattern(answer: str) -> regex.Pattern[str]:
    """Return the pattern of an answer as whole words.

    Raises:
        ConfigError: If the answer has no word.

    Example:
        >>> bool(answer_pattern("Georgia (country)").search("they named GeorgiaCountry first"))
        True
    """
    return regex.compile(_words(answer))


def _words(answer: str) -> str:
    words = regex.findall(r"[^\s,()\[\]]+", answer)
    if not words:
        raise ConfigError(f"the answer {answer!r} has no word to look for; give another one")
    return r"(?i)(?<!\w)" + _INSIDE.join(map(regex.escape, words)) + r"[)\]]?(?!\w)"


def gives_in_place(text: str, groups: Groups) -> bool:
    """Return whether a text begins with all answers, each at its place, and nothing else before or between them.

    With k answers in a group, these are the first k of the text, in any order; those of the next group follow. An
    answer that comes twice takes the place of another one. What the text says behind the last answer does not count.

    Args:
        text: What was written behind the prompt.
        groups: The answers that are expected.

    Example:
        >>> gives_in_place(" Iran and Syria, a country", [["Syria", "Iran"]])
        True
        >>> gives_in_place(" Iran and Syria", [["Syria"], ["Iran"]])
        False
    """
    at = 0
    for group in groups:
        left = list(group)
        while left:
            places = ((regex.match(_BETWEEN + _words(answer), text, pos=at), answer) for answer in left)
            matches = [(match.end(), answer) for match, answer in places if match]
            if not matches:
                return False
            at, answer = max(matches)
            left.remove(answer)
    return True


def share_given(text: str, groups: Groups) -> float:
    """Return the share of the expected answers that occur in a text at all; one that occurs twice counts once.

    Example:
        >>> share_given(" Iraq, Iran, Iran", [["Syria", "Iran"]])
        0.5
    """
    answers = [answer for group in groups for answer in group]
    return sum(bool(answer_pattern(answer).search(text)) for answer in answers) / len(answers)


def same_words(before: str, after: str) -> float:
    """Return Rouge-L's F1 of two answers: of the longest common subsequence of their words; two empty ones are equal.

    Example:
        >>> round(same_words("a city in France", "a town in France"), 2)
        0.75
    """
    first, second = (" ".join(regex.findall(r"\w+", text.lower())) for text in (before, after))
    if not (first and second):
        return float(first == second)
    scores = rouge_score(second, first, rouge_keys="rougeL", normalizer=str, tokenizer=str.split)
    return float(scores["rougeL_fmeasure"])


def _require_groups(texts: Sequence[Any], expected: Sequence[Groups]) -> None:
    """Check that every text has answers to compare with.

    Raises:
        ConfigError: Naming the first one without.
    """
    if len(texts) != len(expected):
        raise ConfigError(f"{len(texts)} texts and {len(expected)} lists of answers; each text needs its own")
    for i, groups in enumerate(expected):
        if isinstance(groups, str) or not groups or any(isinstance(group, str) or not group for group in groups):
            raise ConfigError(f"text {i} has the answers {groups!r}; give a list of answers for each of its questions")


class SequenceSuccess(Mean):
    """SR-S: share of questions whose answer has all edited answers in their places and none wrong before them.

    See ``gives_in_place``; an answer that is repeated before all have come is one in a wrong place.

    Example:
        >>> metric = SequenceSuccess()
        >>> metric.update([" Iran, Syria", " Iraq, Iran, Syria"], [[["Syria", "Iran"]]] * 2)
        >>> float(metric.compute())
        0.5
    """

    def update(self, texts: Sequence[str], expected: Sequence[Groups]) -> None:
        """Add texts, and for each the answers that its prompt's questions have."""
        _require_groups(texts, expected)
        self.add(float(gives_in_place(text, groups)) for text, groups in zip(texts, expected, strict=True))


class AnswerCoverage(Mean):
    """SR-1: share of the edited answers of a question that occur in its answer at all, in the mean over questions.

    Example:
        >>> metric = AnswerCoverage()
        >>> metric.update([" Iraq, Iran"], [[["Syria", "Iran"]]])
        >>> float(metric.compute())
        0.5
    """

    def update(self, texts: Sequence[str], expected: Sequence[Groups]) -> None:
        """Add texts, and for each the answers that its prompt's questions have."""
        _require_groups(texts, expected)
        self.add(share_given(text, groups) for text, groups in zip(texts, expected, strict=True))


class ParaphraseSuccess(Mean):
    """GSR: SR-S on paraphrases; the mean over a question's paraphrases, then over questions that have any.

    Example:
        >>> metric = ParaphraseSuccess()
        >>> metric.update([[" Iran", " Iraq"], []], [[["Iran"]], [["Syria"]]])
        >>> float(metric.compute())
        0.5
    """

    def update(self, texts: Sequence[Sequence[str]], expected: Sequence[Groups]) -> None:
        """Add for each question the texts behind its paraphrases, and its answers."""
        _require_groups(texts, expected)
        pairs = [(each, groups) for each, groups in zip(texts, expected, strict=True) if each]
        self.add(sum(gives_in_place(text, groups) for text in each) / len(each) for each, groups in pairs)


class AnswerStability(Mean):
    """LSR: Rouge-L F1 of the answers to unrelated questions before and after the edits, in the mean.

    Example:
        >>> metric = AnswerStability()
        >>> metric.update([" a city in France", " Rome"], [" a city in France", " Paris"])
        >>> float(metric.compute())
        0.5
    """

    def update(self, before: Sequence[str], after: Sequence[str]) -> None:
        """Add the answers of the unedited model, and those of the edited one.

        Raises:
            ConfigError: If there are not as many of the one as of the other.
        """
        if len(before) != len(after):
            raise ConfigError(f"{len(before)} answers before and {len(after)} after; give both for each question")
        self.add(same_words(*pair) for pair in zip(before, after, strict=True))
