"""Edit requests: a fact to write into a model, and the prompts that probe the result."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from cakeflow.data.text import occurrences
from cakeflow.errors import Fault, has_surrogate

ProbeKind = Literal["paraphrase", "neighborhood", "generation"]

FactToken = Literal["auto", "subject_last", "subject_first", "after_subject", "prompt_last"]
"""Where a fact is written: see ``forward.choose_tokens``."""

_INVISIBLE = ("Zs", "Zl", "Zp", "Cc", "Cf")
"""Unicode categories of invisible characters: white space, controls, zero-width marks."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt that measures what an edit did beyond its own prompt.

    Attributes:
        kind: ``paraphrase`` (should now give the new target), ``neighborhood`` (another subject, should still give its
            own answer) or ``generation`` (start of a free text).
        prompt: The full prompt, subject filled in.
        expected: Right continuation after the edit; by default the request's new target for a paraphrase and its true
            target for a neighborhood prompt.
    """

    kind: ProbeKind
    prompt: str
    expected: str | None = None


@dataclass(frozen=True, slots=True)
class EditRequest:
    """One fact to write into the model.

    Attributes:
        prompt: Text with exactly one ``{}`` where the subject goes, ending where the target starts.
        subject: Subject of the fact.
        target_new: Continuation that the model should give after the edit.
        target_true: Continuation before the edit, if any; the probability forms of the metrics need it.
        probes: Prompts for evaluation only; editing never looks at them.
        relation: Name of the relation, by default the prompt; two targets of one subject and relation contradict.
        reference: Text about the new target, for text metrics.
        case_id: Id of the record in its data set, used by published orders.
        space: Whether a space stands between prompt and target, in the probes too; None lets the texts decide
            (``cakeflow.data.text.join``).
        fact_token: The token at which the fact is written; None takes the edit method's.

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
    space: bool | None = None
    fact_token: FactToken | None = None

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace("{}", self.subject)

    @property
    def subject_end(self) -> int:
        """Index in ``text`` of the character after the subject."""
        return self.prompt.index("{}") + len(self.subject)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data without empty fields; ``parse_requests`` reads it back."""
        return {name: value for name, value in asdict(self).items() if value not in (None, ())}


def is_case_id(value: object) -> bool:
    """Return whether a value can name a record: an integer that can be written as text, or a text that a file holds."""
    if isinstance(value, str):
        return not has_surrogate(value)
    return type(value) is int and abs(value) < 10**100  # bool is an int


def normal_form_hint(text: object, part: object) -> str:
    """Return the end of a remedy where a part occurs in a text but in another Unicode normal form, else nothing."""
    if isinstance(text, str) and isinstance(part, str) and part.strip() and _canonical(part) in _canonical(text):
        return (
            "; it does once both are in one Unicode normal form (NFC against NFD: the same letters, other code "
            "points): apply unicodedata.normalize('NFC', ...) to both"
        )
    return ""


def request_faults(request: EditRequest, index: int) -> list[Fault]:
    """Return all faults of one request.

    Args:
        request: Request whose fields may hold anything.
        index: Position of the request in its list.
    """
    return [Fault(index, *fault) for fault in _faults(request)]


def _canonical(text: str) -> str:
    """Return the text as a reader sees it: white space around it and its Unicode normal form make no difference."""
    return unicodedata.normalize("NFC", text).strip()


def _faults(request: EditRequest) -> Iterator[tuple[str, object, str]]:
    """Yield (field, value, remedy) of each fault."""
    for name in ("prompt", "subject", "target_new"):
        yield from _text_faults(name, getattr(request, name))
    for name in ("target_true", "relation", "reference"):
        yield from _text_faults(name, getattr(request, name), optional=True)
    if request.case_id is not None and not is_case_id(request.case_id):
        yield "case_id", request.case_id, "must be an integer or a text: of 100 digits at most, and valid Unicode"
    if request.space is not None and not isinstance(request.space, bool):
        yield "space", request.space, "must be true or false, or left out"
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
    if request.fact_token is not None and request.fact_token not in get_args(FactToken):
        yield "fact_token", request.fact_token, f"must be one of {', '.join(get_args(FactToken))}, or left out"
    if isinstance(request.prompt, str) and request.prompt.count("{}") != 1:
        yield "prompt", request.prompt, _slot_remedy(request.prompt, request.subject)
    if isinstance(request.subject, str) and request.subject != request.subject.strip():
        yield "subject", request.subject, "remove the white space around it"


def _slot_remedy(prompt: str, subject: object) -> str:
    """Return the remedy for a prompt that has no ``{}`` or several."""
    count = prompt.count("{}")
    remedy = f"needs exactly one {{}} for the subject, found {count}"
    if count:
        return f"{remedy}; write braces that are part of the text as {{ }}"
    if not isinstance(subject, str) or not subject.strip():
        return remedy
    places = len(occurrences(prompt, subject))
    if places > 1:
        return f"{remedy}; the subject occurs {places} times: put {{}} where it is meant"
    if places == 1:
        return f"{remedy}; put it in place of the subject"
    if subject in prompt:
        return f"{remedy}; the subject occurs only inside a longer word: put {{}} where it is meant"
    return f"{remedy}, and the subject does not occur either{normal_form_hint(prompt, subject)}"


def _text_faults(name: str, value: object, *, optional: bool = False) -> Iterator[tuple[str, object, str]]:
    if not isinstance(value, str):
        if value is not None or not optional:
            yield name, value, "must be a string"
    elif all(unicodedata.category(character) in _INVISIBLE for character in value):
        yield name, value, "must not be empty or blank"
    elif has_surrogate(value):
        yield name, value, "has a lone surrogate; give valid Unicode text"


def _probe_faults(probe: Probe) -> Iterator[tuple[str, object, str]]:
    if probe.kind not in get_args(ProbeKind):
        yield "probes.kind", probe.kind, f"must be one of {', '.join(get_args(ProbeKind))}"
    yield from _text_faults("probes.prompt", probe.prompt)
    yield from _text_faults("probes.expected", probe.expected, optional=True)


def contradictions(requests: Sequence[EditRequest], among: Iterable[int] | None = None) -> list[Fault]:
    """Find the requests that contradict an earlier one: no weights can satisfy both.

    Two requests contradict each other if they have the same subject and relation (by default the prompt) and different
    new targets; white space around a text and its Unicode normal form make no difference. Each is compared with the
    first one of its subject and relation, so without the requests named here the others agree.

    Args:
        requests: All requests.
        among: Indices of those that are edited, in their sequence; by default all in order.

    Returns:
        One fault for each contradicting request, by its index in ``requests``.

    Example:
        >>> ends = [EditRequest("{} flows into", "Elbe", sea) for sea in ("the Baltic Sea", "the Black Sea")]
        >>> [fault.index for fault in contradictions(ends)], [fault.index for fault in contradictions(ends, [1, 0])]
        ([1], [0])
    """
    faults: list[Fault] = []
    first: dict[tuple[str, str], int] = {}
    for index in range(len(requests)) if among is None else among:
        request = requests[index]
        other = first.setdefault((_canonical(request.subject), _canonical(request.relation or request.prompt)), index)
        target = requests[other].target_new
        if _canonical(target) != _canonical(request.target_new):
            remedy = f"contradicts entry {other} (same subject and relation, target {target!r}); keep one of them"
            faults.append(Fault(index, "target_new", request.target_new, remedy))
    return faults
