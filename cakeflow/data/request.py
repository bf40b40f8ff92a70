"""What a user asks for: one fact to edit, and the prompts that probe the result."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from cakeflow.errors import Fault

ProbeKind = Literal["paraphrase", "neighborhood", "generation"]


_UNSEEN = ("Zs", "Zl", "Zp", "Cc", "Cf")
"""Unicode categories of characters that show nothing: white space, controls, zero-width marks."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt that shows what an edit did beyond its own prompt.

    Attributes:
        kind: ``paraphrase`` (should now give the new target), ``neighborhood`` (another subject:
            should still give its own answer) or ``generation`` (start of a free text).
        prompt: The full prompt, subject filled in.
        expected: Right continuation after the edit; by default the request's new target for a
            paraphrase and its true target for a neighborhood prompt.
    """

    kind: ProbeKind
    prompt: str
    expected: str | None = None


@dataclass(frozen=True, slots=True)
class EditRequest:
    """One fact to write into the model.

    Attributes:
        prompt: Text with exactly one ``{}`` where the subject goes, ending where the target starts.
        subject: What the fact is about.
        target_new: What the model should continue with.
        target_true: What it continues with today, where known; the probability forms of the metrics need it.
        probes: Prompts for evaluation only; editing never looks at them.
        relation: Name of the relation; with the subject it tells contradictions apart (default: the prompt).
        reference: A text about the new target, for text metrics.
        case_id: Name of the record in its data set, by which a published order picks it.

    Example:
        >>> EditRequest("{} plays the sport of", "LeBron James", "tennis").text
        'LeBron James plays the sport of'
    """

    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None
    probes: tuple[Probe, ...] = ()
    relation: str | None = None
    reference: str | None = None
    case_id: int | str | None = None

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace("{}", self.subject)

    @property
    def subject_end(self) -> int:
        """Index of the character after the subject in ``text``."""
        return self.prompt.index("{}") + len(self.subject)

    def to_dict(self) -> dict[str, Any]:
        """The request as plain JSON-ready data, empty fields left out; ``parse_requests`` reads it back."""
        return {name: value for name, value in asdict(self).items() if value not in (None, ())}


def _starts(text: str, part: str) -> list[int]:
    """Where a part begins in a text, overlapping occurrences too; a blank one is nowhere."""
    return [at for at in range(len(text)) if text.startswith(part, at)] if part.strip() else []


def _canonical(text: str) -> str:
    """What tells texts apart to a reader: neither white space around them nor how their accents are written."""
    return unicodedata.normalize("NFC", text).strip()


def _normal_form(text: object, part: object) -> str:
    """The end of a remedy where only the Unicode normal form keeps a part from being found in a text."""
    if isinstance(text, str) and isinstance(part, str) and part.strip() and _canonical(part) in _canonical(text):
        return (
            "; it does once both are in one Unicode normal form (NFC against NFD: the same letters, other code "
            "points): apply unicodedata.normalize('NFC', ...) to both"
        )
    return ""


def _faults(request: EditRequest) -> Iterator[tuple[str, object, str]]:
    """Everything wrong with one request, as (field, value, remedy)."""
    for name in ("prompt", "subject", "target_new"):
        yield from _text_faults(name, getattr(request, name))
    for name in ("target_true", "relation", "reference"):
        yield from _text_faults(name, getattr(request, name), optional=True)
    if request.case_id is not None and type(request.case_id) not in (int, str):
        yield "case_id", request.case_id, "must be an integer or a text"
    yield from _prompt_faults(request)
    new, true = request.target_new, request.target_true
    if isinstance(new, str) and isinstance(true, str) and _canonical(new) == _canonical(true):
        yield "target_new", request.target_new, "equals target_true; there is nothing to edit"
    if not isinstance(request.probes, tuple) or not all(isinstance(probe, Probe) for probe in request.probes):
        yield "probes", request.probes, "must be a tuple of Probe"
    else:
        for probe in request.probes:
            yield from _probe_faults(probe)


def _prompt_faults(request: EditRequest) -> Iterator[tuple[str, object, str]]:
    if isinstance(request.prompt, str) and request.prompt.count("{}") != 1:
        yield "prompt", request.prompt, _slot_remedy(request.prompt, request.subject)
    if isinstance(request.subject, str) and request.subject != request.subject.strip():
        yield "subject", request.subject, "remove the white space around it"


def _slot_remedy(prompt: str, subject: object) -> str:
    """What to do about a prompt that does not have its one ``{}``."""
    count = prompt.count("{}")
    remedy = f"needs exactly one {{}} for the subject, found {count}"
    if count:
        return f"{remedy}; write braces that are part of the text as {{ }}"
    if not isinstance(subject, str) or not subject.strip():
        return remedy
    places = len(_starts(prompt, subject))
    if places > 1:
        return f"{remedy}; the subject occurs {places} times: put {{}} where it is meant"
    if places == 1:
        return f"{remedy}; put it in place of the subject"
    return f"{remedy}, and the subject does not occur either{_normal_form(prompt, subject)}"


def _text_faults(name: str, value: object, *, optional: bool = False) -> Iterator[tuple[str, object, str]]:
    if not isinstance(value, str):
        if value is not None or not optional:
            yield name, value, "must be a string"
    elif all(unicodedata.category(character) in _UNSEEN for character in value):
        yield name, value, "must not be empty or blank"
    elif any("\ud800" <= character <= "\udfff" for character in value):
        yield name, value, "has a lone surrogate; give valid Unicode text"


def _probe_faults(probe: Probe) -> Iterator[tuple[str, object, str]]:
    if probe.kind not in get_args(ProbeKind):
        yield "probes.kind", probe.kind, f"must be one of {', '.join(get_args(ProbeKind))}"
    yield from _text_faults("probes.prompt", probe.prompt)
    yield from _text_faults("probes.expected", probe.expected, optional=True)


def contradictions(requests: Sequence[EditRequest], among: Iterable[int] | None = None) -> list[Fault]:
    """The requests that contradict an earlier one: no weights can satisfy both.

    Two requests contradict each other if they have the same subject and relation (the prompt stands for a relation that
    is missing) and different new targets; white space around a text and its Unicode normal form make no difference.
    Each is compared with the first one of its subject and relation, so without those that are named here the others
    agree.

    Args:
        requests: Requests.
        among: Indices of those that are to be edited, in their sequence; by default all as they stand.

    Returns:
        One problem for each, by its index in ``requests``.

    Example:
        >>> ends = [EditRequest("{} flows into", "Elbe", sea) for sea in ("the Baltic Sea", "the Black Sea")]
        >>> [problem.index for problem in contradictions(ends)], [p.index for p in contradictions(ends, [1, 0])]
        ([1], [0])
    """
    problems: list[Fault] = []
    seen: dict[tuple[str, str], int] = {}
    for index in range(len(requests)) if among is None else among:
        request = requests[index]
        other = seen.setdefault((_canonical(request.subject), _canonical(request.relation or request.prompt)), index)
        target = requests[other].target_new
        if _canonical(target) != _canonical(request.target_new):
            remedy = f"contradicts entry {other} (same subject and relation, target {target!r}); keep one of them"
            problems.append(Fault(index, "target_new", request.target_new, remedy))
    return problems
