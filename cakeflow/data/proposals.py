"""Checks proposed for a fact that comes without any: other wordings, and other subjects of its relation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import regex

from cakeflow.data.builtin import builtin_relations
from cakeflow.data.request import EditRequest, Probe

FRAMES = ("It is well known that", "A friend of mine told me that")
"""Openings that make another wording of any sentence."""
NEIGHBORS = 4
"""Number of other subjects."""
_COMMON = regex.compile(
    r"(?:the|an?|of|in|on|at|by|to|as|for|from|with|is|are|was|were|has|have|which|who|whom|that|and|known|called)\Z"
)
"""Words that say nothing of the relation."""
STEM = 4
"""Letters by which words are compared: plays is playing."""


def propose(request: EditRequest) -> EditRequest:
    """Return a request with proposed paraphrases and neighbors; as it is if it has probes.

    If its prompt says what a wording of a built-in relation says, the relation's other wordings and subjects are
    proposed. Neighbors have no answer of their own: of a fact with a true target they are subjects of that target, of
    another one the model's own answer counts. Otherwise the prompt is put behind
    openings such as "It is well known that".

    Example:
        >>> fact = propose(EditRequest("{} plays the sport of", "Ann Lee", "tennis"))
        >>> [probe.prompt for probe in fact.probes if probe.kind == "paraphrase"][1]
        'The sport that made Ann Lee a star is'
        >>> [probe.prompt for probe in propose(EditRequest("{} was founded by", "Google", "Ann")).probes][0]
        'It is well known that Google was founded by'
    """
    if request.probes:
        return request
    relation = _relation_of(request.prompt)
    if relation is None:
        texts = [f"{frame} {_uncapitalised(request)}" for frame in FRAMES]
        return replace(request, probes=tuple(Probe("paraphrase", text) for text in texts))
    wordings = [each for each in _wordings(relation) if each != request.prompt]
    probes = [Probe("paraphrase", each.replace("{}", request.subject)) for each in wordings[:3]]
    targets, true = relation["targets"], request.target_true
    chosen = [each for name, each in targets.items() if true in (None, name)]
    rows = zip(*(each["subjects"] for each in chosen), strict=False) if chosen else ()  # targets take turns
    subjects = [name for row in rows for name in row]
    others = [name for name in subjects if name.lower() != request.subject.lower()][:NEIGHBORS]
    probes += [Probe("neighborhood", request.prompt.replace("{}", name)) for name in others]
    return replace(request, probes=tuple(probes))


def _wordings(relation: dict[str, Any]) -> list[str]:
    return [relation["prompt"], *relation["paraphrases"]]


def _relation_of(prompt: str) -> dict[str, Any] | None:
    """Return the built-in relation one of whose wordings has all meaningful words of a prompt, and few others."""
    stems = _stems(prompt)
    relations = builtin_relations() if stems else []
    return next((each for each in relations if any(_fits(stems, text) for text in _wordings(each))), None)


def _fits(stems: set[str], wording: str) -> bool:
    whole = _stems(wording)
    return stems <= whole and 2 * len(stems) >= len(whole)


def _stems(text: str) -> set[str]:
    words = regex.findall(r"\p{L}+", text.lower())
    return {word[:STEM] for word in words if not _COMMON.match(word)}


def _uncapitalised(request: EditRequest) -> str:
    """Return the text of a request for the middle of a sentence; a name keeps its capital, an article does not."""
    text = request.text
    is_name = request.prompt.startswith("{}") or text.startswith("I ") or text[:2].isupper()
    return text if is_name and not regex.match(r"(?:The|An?) ", text) else text[:1].lower() + text[1:]
