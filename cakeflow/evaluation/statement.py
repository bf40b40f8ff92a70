"""Statements in free answers: rules of English, none of them about one question, that tell them from mere mentions.

A name that an answer contains is not stated where it is denied ("not Rome"), one of two ("Rome or Paris"), in a part
that says something else ("Oslo, although Rome is warmer"), or, in a chat, said of another subject than the one asked.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

import regex

from cakeflow.data.text import occurrences, plain, states

NUMBERS = {
    name: str(value)
    for value, name in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
    )
}
"""Words that are compared as numbers."""
_DENIAL = regex.compile(
    r"\b(?:not(?! (?:only|just|merely|simply)\b)|never|neither|nor|cannot|rather than|instead of|other than|no longer"
    r"|(?:is|was|are|were|do|does|did|has|have|had|can|could|would|will|should|wo|ca)nt)\b"
)
_CHOICE_IN_FRONT, _CHOICE_BEHIND = regex.compile(r"\b(?:or|either)\Z"), regex.compile(r"\A(?:and )?or\b")
_CLAUSE = regex.compile(r"[;:.!?()\u2013\u2014]|,(?!\s*(?:and/)?or\b)|\bbut\b", regex.IGNORECASE)
_ASIDE = regex.compile(
    r"[,;(]?\s*\b(?:which|who|whom|whose|where|that|but|although|though|while|whereas|however|because|when|since)\b",
    regex.IGNORECASE,
)
_PRONOUN = regex.compile(
    r"(?i)\A\W*(?:it|he|she|they|this|these|its|his|her|their|the answer|yes|there|in|from|by|at|on|to)\b"
)
"""Beginning of an answer that speaks of what was asked without naming it, or is no sentence."""


def is_stated(answer: str, name: str, subject: str = "", *, chat: bool = False) -> bool:
    """Return whether an answer states a name, as a careful reader would take it.

    Args:
        answer: The answer.
        name: What it should state.
        subject: What the question is about; empty if that is not known.
        chat: Whether the answer is a sentence of its own rather than the end of the question.

    Example:
        >>> is_stated(" Rome, in Italy", "Rome"), is_stated(" not Rome", "Rome"), is_stated(" Rome or Oslo", "Rome")
        (True, False, False)
        >>> [is_stated(text, "Norway", "Lund", chat=True) for text in ("Oslo lies in Norway.", "It lies in Norway.")]
        [False, True]
    """
    answer, name, subject = map(_normal, (answer, name, subject))
    if chat and not _is_about(answer, subject, name):
        return False
    part = answer if chat else _main_part(answer)
    clauses = [clause for clause in _CLAUSE.split(part) if states(clause, name)]
    if not clauses:  # a name that has such a sign in it
        clauses = [part] if states(part, name) else []
    return any(_affirms(clause, name) for clause in clauses)


def _affirms(clause: str, name: str) -> bool:
    """Return whether one mention of a name in a clause is neither denied nor one of two."""
    return any(
        not (_DENIAL.search(front) or _CHOICE_IN_FRONT.search(front) or _CHOICE_BEHIND.search(behind))
        for front, behind in _around(plain(clause), plain(name))
    )


def _around(text: str, name: str) -> Iterator[tuple[str, str]]:
    """Yield what stands before and behind each mention of a name in plain text; all of it where the signs differ."""
    places = [match.span() for match in regex.finditer(rf"(?<!\w){regex.escape(name)}(?!\w)", text)]
    for start, end in places or [(len(text), len(text))]:
        yield text[:start].strip(), text[end:].strip()


def _main_part(answer: str) -> str:
    """Return the part of a completion that completes the question: up to an aside, unless it begins with one.

    What follows "but" completes it where the first part is a denial ("not Oslo but Rome").
    """
    for aside in _ASIDE.finditer(answer):
        front = answer[: aside.start()]
        if front.strip() and not (aside[0].lower().endswith("but") and regex.search(r"\bnot\b", front)):
            return front
    return answer


def _is_about(answer: str, subject: str, name: str) -> bool:
    """Return whether an answer in a chat is about the subject: by its name, a part of it or a pronoun, or it is short.

    Parts are the first and the last word, written with capitals as they are there: persons are named by either.
    """
    parts = [word for word in subject.split()[:: max(1, len(subject.split()) - 1)] if word[:1].isupper()]
    parts = [word for word in parts if plain(word) not in ("a", "an", "the")]
    named = not subject or states(answer, subject) or any(occurrences(answer, word) for word in parts)
    short = len(plain(answer).split()) <= len(plain(name).split()) + 2
    return named or short or bool(_PRONOUN.match(answer))


def _normal(text: str) -> str:
    """Return a text without accents, with "and" for "&", and numbers in figures."""
    letters = unicodedata.normalize("NFKD", text)
    bare = "".join(each for each in letters if not unicodedata.combining(each)).replace("&", " and ")
    return str(regex.sub(r"\p{L}+", lambda match: NUMBERS.get(match[0].lower(), match[0]), bare))
