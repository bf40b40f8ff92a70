"""Rules of written text: the space between a prompt and its target, whole words, the end of an answer, comparing.

Scripts without spaces between words (Chinese, Japanese, Thai ...) are told by Unicode's script property, together with
the full-width punctuation that they share.
"""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Callable
from typing import Literal

import regex

Occurrence = Literal["first", "last"]
"""Occurrence of a subject, as whole words, that a prompt without ``{}`` means."""

_SOLID = (
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Yi}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}\p{Tai_Tham}"
    r"\p{Tai_Le}\p{New_Tai_Lue}\p{Tai_Viet}\p{Javanese}\p{Balinese}\u3001-\u303f\u30fc\uff01-\uff9f]"
)
"""A character of a script without spaces."""
_LETTER = rf"[[\p{{L}}\p{{M}}\p{{N}}\p{{Pc}}]--{_SOLID}]"
"""A character of a word, in a script with spaces."""


def _pattern(text: str) -> regex.Pattern[str]:
    return regex.compile(text, regex.VERSION1)  # with set operations


# ---- the space between a prompt and its target ----

_GLUE = _pattern(r"(?:\A|\s|\p{Ps}|(?<![^\s\p{Ps}])[@#]|(?<=[\p{L}\p{N}])[\p{Pd}/])\Z")
"""End of a prompt after which no space is written: white space, a bracket, a hyphen after a word."""
_ELISION = _pattern(r"(?i)(?<![\p{L}\p{N}])(?:\p{L}|\p{L}*(?:qu|ll)|un|quest|sant)['\u2019]\Z")
"""French and Italian words that an apostrophe ties to the next one; an English possessive ends with s."""
_FIRST_QUOTE = _pattern(r"(?:\A|[\s\p{Ps}])['\u2018]\p{L}")
_QUOTES = _pattern(r"[\p{Ps}\p{Pi}\p{Pf}\"'`]+\Z")
_TIED = _pattern(
    r"(?i)\A(?:\s|\p{Pe}|[[\p{Po}\p{Pe}\p{Pf}]&&[\u3001-\u303f\uff01-\uff65]]|['\u2019](?:s|t|d|m|re|ve|ll)\b"
    r"|[,.;:!?…%]+(?:[\s\p{Pe}\p{Pf}\"']|\Z)|[\p{Pf}\"'](?:[\s,.;:!?\p{Pe}]|\Z))"
)
"""Beginning of a target before which no space is written: white space, closing punctuation, 's."""
_IS_SOLID, _TRAILING_SIGNS = _pattern(_SOLID), _pattern(rf"[[\p{{P}}\p{{S}}]--{_SOLID}]+\Z")


def join(prompt: str, target: str, space: bool | None = None) -> str:
    """Join prompt and target as they would be written: with a space, unless their script or punctuation forbids it.

    Args:
        prompt: The prompt.
        target: The target.
        space: Whether there is a space; None lets the texts decide.

    Example:
        >>> join("The capital of France is", "Paris"), join("法国的首都是", "巴黎"), join("It is called «", "Paris»")
        ('The capital of France is Paris', '法国的首都是巴黎', 'It is called «Paris»')
    """
    return prompt + separator(prompt, target, space) + target


def separator(prompt: str, target: str, space: bool | None = None) -> str:
    """Return what stands between prompt and target, a space or nothing; arguments as for ``join``."""
    if space is not None:
        return " " if space else ""
    tied = (
        _GLUE.search(prompt)
        or _TIED.search(target)
        or _opens_quote(prompt)
        or (_ELISION.search(prompt) and not _FIRST_QUOTE.search(prompt) and target[:1].isalnum())
        or (regex.search(r"\p{Sc}\Z", prompt) and target[:1].isdigit())
        or _is_solid(prompt, target)
    )
    return "" if tied else " "


def _opens_quote(prompt: str) -> bool:
    """Return True if a prompt ends with a quotation mark that opens; straight and German ones do not say so."""
    marks = _QUOTES.search(prompt)
    if not marks:
        return False
    before = prompt[: marks.start()]
    if not before or before[-1].isspace() or regex.search(r"\p{Ps}", marks[0]):
        return True
    if regex.search(r"[\p{L}\p{M}\p{N}]\Z", before):
        return False
    return bool(regex.search(r"[\p{Pd}:=/]\Z", before)) or (marks[0][-1] == '"' and prompt.count('"') % 2 == 1)


def _is_solid(prompt: str, target: str) -> bool:
    """Return True if prompt and target meet in a text without spaces; a foreign name in other text does not make one.

    "Chinese for Rome is" + "罗马" and "the capital of 中国" + "is" are English; "首都是" + "Paris" is Chinese.
    """
    first, last = _IS_SOLID.match(target), _IS_SOLID.match(prompt[-1:])
    if first and last:
        return True
    *earlier, end = prompt.rsplit(None, 2)[-2:]
    met = first or _IS_SOLID.match(_TRAILING_SIGNS.sub("", end)[-1:])
    return bool(met and all(map(_IS_SOLID.search, [*earlier, end])))


# ---- whole words ----

_SPLIT_IN_FRONT = _pattern(rf"{_LETTER}{_LETTER}|\u200d.")
_SPLIT_BEHIND = _pattern(rf"[{_LETTER}--\p{{Hangul}}]{{2}}|.[\p{{M}}\p{{Emoji_Modifier}}\u200d]")
"""Two characters that no word boundary parts."""


def occurrences(text: str, part: str) -> list[int]:
    """Return the indices at which a part begins in a text as whole words, overlapping ones included.

    Scripts without spaces have no words to be inside of, and Korean ties particles to the end of a word; a letter is
    never parted from its marks.

    Example:
        >>> occurrences("Is Annabel a friend of Ann?", "Ann"), occurrences("我们学习的是历史", "历史")
        ([23], [6])
    """
    places = [at for at in range(len(text)) if text.startswith(part, at)] if part.strip() else []
    return [at for at in places if _is_whole(text, at, at + len(part))]


def as_template(prompt: str, subject: str, occurrence: Occurrence | None = None) -> str:
    """Return a prompt with ``{}`` in place of its subject, or as it is if the place is uncertain.

    Args:
        prompt: The prompt.
        subject: Its subject.
        occurrence: Which one counts where there are several; None makes the place uncertain.

    Example:
        >>> as_template("Ann likes Ann", "Ann", "last"), as_template("Ann likes Ann", "Ann")
        ('Ann likes {}', 'Ann likes Ann')
    """
    places = occurrences(prompt, subject)
    if not places or (len(places) > 1 and occurrence is None):
        return prompt
    at = places[-1 if occurrence == "last" else 0]
    return f"{prompt[:at]}{{}}{prompt[at + len(subject) :]}"


def _is_whole(text: str, start: int, end: int) -> bool:
    in_front, behind = text[max(0, start - 1) : start + 1], text[end - 1 : end + 1]
    return not (_SPLIT_IN_FRONT.fullmatch(in_front) or _SPLIT_BEHIND.fullmatch(behind))


# ---- the end of an answer ----

_STOP = _pattern(
    r"\R|[\p{Sentence_Terminal}--[.!?\uff0e]]|\uff0e(?!\p{N})|[.!?]+(?=[\p{Pe}\p{Pf}\"'*_]*(?:\s|\[|\Z))"
    r"|(?<=\p{Ll}\p{Ll})[.!?](?=\p{Lu}\p{Ll})"
)
"""A possible end: a line break, a stop that ends nothing but sentences, or a Latin one with a space behind it."""
_ANY_STOP = _pattern(r"\.|\R")
_OPENING = _pattern(
    r"\s+(?:After|Also|And|As|At|Because|Before|But|By|During|For|From|He|Her|Here|His|However|If|In|It|Its|Most|On|One|"
    r"Our|She|Since|So|Some|That|The|Their|Then|There|These|They|This|Those|To|We|What|When|Where|While|With|You)\b"
)
"""Words that begin a sentence rather than go on with a name."""
_SHORT = _pattern(
    r"(?i)(?<![\p{L}\p{N}])(?:abp|adm|approx|assn|atty|ave|blvd|bp|bros|capt|cf|cmdr|co|col|corp|cos|cpl|dept|dr|etc|fr|"
    r"ft|gen|gov|hon|hr|inc|jr|llc|lt|ltd|maj|messrs|mlle|mme|mr|mrs|ms|mt|mts|ph\.d|pres|prof|rep|rev|sen|sgt|sr|st|"
    r"sta|ste|sto|supt|univ|vs|(?:\p{L}\.\s?)*\p{L})\Z"
)
"""Initials, and abbreviations after which a sentence usually goes on."""
_SHORT_BEFORE_NUMBERS = _pattern(
    r"(?i)(?<![\p{L}\p{N}])(?:apr|art|aug|ch|dec|feb|fig|jan|jul|jun|mar|nos?|nov|nr|oct|op|pp?|sec|sept?|vol)\Z"
)


def until_stop(text: str) -> str:
    """Return a continuation up to where a reader would end the answer: the end of its first sentence or line.

    The full stop of an initial, an abbreviation or a number ends nothing.

    Example:
        >>> until_stop(" St. Petersburg. It is old"), until_stop(" 3.5 million"), until_stop("北京。中国")
        (' St. Petersburg', ' 3.5 million', '北京')
    """
    ends = (match.start() for match in _STOP.finditer(text) if not _is_inside(text, match))
    return text[: next(ends, len(text))]


def until_any_stop(text: str) -> str:
    """Return a continuation up to its first full stop or line break, whatever it belongs to: the rule of WILD's tables.

    Example:
        >>> until_any_stop(" St. Petersburg. It is old")
        ' St'
    """
    match = _ANY_STOP.search(text)
    return text[: match.start()] if match else text


def is_over(text: str, cut: Callable[[str], str] = until_stop) -> bool:
    """Return whether a continuation is cut at the same place however it goes on: a word and more stand behind the cut.

    Args:
        text: The beginning of a continuation.
        cut: The function that cuts it, which looks no further than the word behind a stop.

    Example:
        >>> is_over(" Rome. It"), is_over(" Rome. It is old"), is_over(" St. Petersburg is old")
        (False, True, False)
    """
    return len(text[len(cut(text)) :].split()) > 2


def _is_inside(text: str, stop: regex.Match[str]) -> bool:
    """Return True if a stop is inside a sentence: an abbreviation's, or a name's before a small letter (Yahoo! is)."""
    before, after = text[: stop.start()], text[stop.end() :]
    if stop[0] in "!?":
        return bool(regex.match(r"\s+\p{Ll}", after))
    if stop[0] != "." or not after.strip() or _OPENING.match(after):
        return False
    if _SHORT_BEFORE_NUMBERS.search(before):
        return bool(regex.match(r"\s+\p{N}", after))
    return bool(_SHORT.search(before))


# ---- comparing answers ----

_PUNCTUATION = _pattern(rf"[\p{{P}}{regex.escape(string.punctuation)}]")


def plain(text: str) -> str:
    """Return a text without case, punctuation and articles, as SQuAD's exact match compares answers.

    Full-width letters count as what they show, and a text of punctuation alone stays.

    Example:
        >>> plain(" The Hague, "), plain("「東京」")
        ('hague', '東京')
    """
    return _words(text, "")


def _words(text: str, gap: str) -> str:
    """Return a text as ``plain`` does, with something in the place of each sign of punctuation."""
    text = unicodedata.normalize("NFKC", text).lower()
    words = _PUNCTUATION.sub(gap, text).split() or text.split()
    return " ".join(word for word in words if word not in ("a", "an", "the")) or " ".join(words)


def states(answer: str, name: str) -> bool:
    """Return True if an answer contains a name as whole words, up to case, punctuation and articles.

    Punctuation joins words or parts them: "U.S." is "US", and "Vienna's" names Vienna.

    Example:
        >>> states(" the city of New York.", "New York"), states(" Romeo", "Rome"), states(" Vienna's hills", "Vienna")
        (True, False, True)
    """
    return any(occurrences(_words(answer, gap), _words(name, gap)) for gap in ("", " "))
