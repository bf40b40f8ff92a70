"""The subject of a sentence that is to be continued: a guess from capital letters and a few words, to be shown."""

from __future__ import annotations

import regex

_WORD = regex.compile(r"[\p{L}\p{N}][\p{L}\p{M}\p{N}.&+'\u2019\-]*[\p{L}\p{M}\p{N}+]|[\p{L}\p{N}]|&")
_OPENING = regex.compile(r"(?i)\A(?:in|on|at|for|from|during|since|after|before|according to|as)\b[^,]*,\s+")
"""A phrase in front of the sentence, up to its comma."""
_INSIDE = regex.compile(r"(?:of|the|and|or|de|la|le|du|des|von|van|der|den|in|on|to|for|with|an?|&|y|el?|d[io]|dos)\Z")
"""Words in small letters that may stand inside a name."""
_FUNCTION = regex.compile(
    r"(?i)(?:the|an?|in|on|at|by|of|for|from|to|and|or|but|with|as|is|are|was|were|has|have|had|do|does|did|who|what|"
    r"which|when|where|why|how|its?|he|she|they|we|you|i|his|her|their|our|my|your|this|that|these|those|one|during|"
    r"since|after|before|if|people|everyone|fans|critics|scientists|historians|experts)\Z"
)
"""Words whose capital says only that the sentence begins."""
_VERB = (
    r"(?:is|are|was|were|has|have|had|can|will|would|should|could|may|might|must|comes?|came|belongs?|lies|lay|plays?|"
    r"played|works?|worked|lives?|lived|speaks?|spoke|became|becomes?|originates?|originated|died|stands?|stood|flows?)"
)
_BEFORE_VERB = regex.compile(
    rf"(?:\b(?:as|called|named|of|the|a|an|that)\s+)?((?:(?!\b(?:as|called|named)\b)\S+\s+){{0,3}}?\S+)\s+{_VERB}\b"
)
_POSSESSIVE = regex.compile(r"['\u2019]s\Z")
_OWNER = regex.compile(r"\A(\S+(?: \S+){0,3})['\u2019]s\s")
_CAPITAL_NEXT = regex.compile(r"\s+\p{Lu}")
_ARTICLE = regex.compile(r"(?i)\A(?:the|a|an)\s+")


def guess_subject(prompt: str) -> str | None:
    """Return the probable subject of a prompt: its first name or, without capitals, the words before the verb.

    Args:
        prompt: The beginning of a sentence that is to be continued.

    Returns:
        A part of the prompt; None if there is nothing to guess from.

    Example:
        >>> guess_subject("LeBron James plays the sport of"), guess_subject("In Peru, the capital of France is")
        ('LeBron James', 'France')
        >>> guess_subject("The dish known as pad thai comes from the country of"), guess_subject("is")
        ('pad thai', None)
    """
    owner = _OWNER.match(prompt)
    if owner and not _names(owner[1]):
        return str(_ARTICLE.sub("", owner[1]))
    start = opening.end() if (opening := _OPENING.match(prompt)) else 0
    for part in (prompt[start:], prompt):  # "In Peru, the language spoken is" has no other name
        if names := _names(part):
            return str(part[slice(*names[0])])
    match = _BEFORE_VERB.search(prompt, start)
    return str(_ARTICLE.sub("", match[1])) if match and not _FUNCTION.match(match[1]) else None


def _names(text: str) -> list[tuple[int, int]]:
    """Return start and end of each name: words with a capital, and numbers and small words between or before them."""
    names: list[tuple[int, int]] = []
    is_open = False
    for match in _WORD.finditer(text):
        word, end = match[0], match.end()
        if _POSSESSIVE.search(word) and not _CAPITAL_NEXT.match(text, end):  # what it owns is no name
            end -= 2
        touches = is_open and _is_gap(text[names[-1][1] : match.start()])
        capital = any(sign.isupper() for sign in word) and not (match.start() == 0 and _FUNCTION.match(word))
        number = word[0].isdigit() and (touches or _CAPITAL_NEXT.match(text, match.end()))
        if capital or number:
            names = [*names[:-1], (names[-1][0], end)] if touches else [*names, (match.start(), end)]
        is_open = bool(capital or number or (is_open and _INSIDE.match(word))) and end == match.end()
    return names


def _is_gap(text: str) -> bool:
    """True if what stands between two words of a name may stand inside it."""
    return not regex.search(r"[,;:!?()\"]", text)
