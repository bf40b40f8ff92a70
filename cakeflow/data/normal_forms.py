"""Normal forms of texts: one text in other letters that look the same, or with invisible ones, has a form in common."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

import regex
from confusable_homoglyphs.confusables import confusables_data

_BLANK = regex.compile(r"[\s\u115f\u1160\u2800]+")
"""White space, and letters that show nothing but take its room."""
_INVISIBLE = regex.compile(r"[\p{Default_Ignorable_Code_Point}\p{Cf}\p{Cc}]+")
_MARKS = regex.compile(r"(?V1)[\p{Mn}&&\p{Script=Inherited}]+")
"""Accents of Latin, Greek and Cyrillic letters and vowel marks of Arabic; in other scripts, marks make the word."""
_LETTER = regex.compile(r"(?:LATIN|REGIONAL INDICATOR).* (?:LETTER|CAPITAL) ([A-Z])(?: |$)")
"""In a Unicode name: the plain letter of one with a stroke, in a frame or in small capitals."""
_STROKES = "il"
"""Letters for which a vertical stroke of another script may stand: capital I and small L look the same."""
LOOKALIKES: dict[str, str] = {
    letter: plain[0]
    for letter, others in confusables_data.items()
    if len(letter) == 1 and not letter.isascii() and (plain := [o["c"] for o in others if o["c"].isascii()])
} | {"\N{CYRILLIC SMALL LETTER PALOCHKA}": "l"}
"""Letter of another script -> what it looks like in ASCII, from the confusables of Unicode (UTS 39)."""


def normal_forms(text: str) -> tuple[str, ...]:
    """Return a text as a matcher should see it, in each form in which it may be meant.

    In all of them, compatibility forms (full width, ligatures) are the usual letters (NFKC), case is folded, invisible
    characters are left out and white space is one space. The first keeps its letters; in the others, letters that look
    like ASCII ones are those, without accents.

    Example:
        >>> normal_forms("\N{CYRILLIC CAPITAL LETTER IE}if\N{SOFT HYPHEN}fel  Tower")[1]
        'eiffel tower'
    """
    text = _plain(text)
    forms = [text, *(_MARKS.sub("", _similar(text, stroke)) for stroke in _STROKES)]
    return tuple(form.casefold() for form in forms)


def pattern_forms(pattern: str) -> tuple[str, ...]:
    """Return a regular expression once for each of ``normal_forms``, to be matched without regard to case.

    Example:
        >>> pattern_forms("\N{CYRILLIC SMALL LETTER ER}ari[s\N{CYRILLIC SMALL LETTER DZE}]")[1]
        'pari[ss]'
    """
    pattern = unicodedata.normalize("NFKC", regex.sub(r"[\p{Default_Ignorable_Code_Point}\p{Cf}]+", "", pattern))
    pattern = regex.sub(r"[ \t]+", " ", pattern)
    return (pattern, *(_similar(pattern, stroke, escape=True) for stroke in _STROKES))


def _plain(text: str) -> str:
    text = _BLANK.sub(" ", unicodedata.normalize("NFKC", text))
    return unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).strip()


def _similar(text: str, stroke: str, *, escape: bool = False) -> str:
    """Return a text with ASCII for letters that look like it, ``stroke`` for a vertical stroke."""
    return text if text.isascii() else "".join(_letters(text, stroke, escape=escape))


def _letters(text: str, stroke: str, *, escape: bool) -> Iterator[str]:
    for letter in text:
        if letter.isascii():
            yield letter
            continue
        plain = LOOKALIKES.get(letter) or _stem(letter)
        plain = stroke if plain in ("l", "I", "|") else plain
        yield regex.escape(plain) if escape and plain.isascii() else plain


def _stem(letter: str) -> str:
    """Return the ASCII letter of a Latin one with additions; any other letter as it is."""
    base = unicodedata.normalize("NFD", letter)[0]
    match = _LETTER.search(unicodedata.name(base, ""))
    if base.isascii() or base in LOOKALIKES:
        return LOOKALIKES.get(base, base)
    return match[1] if match else letter
