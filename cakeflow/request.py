"""What a user asks for: one fact to edit, and the prompts that probe the result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from cakeflow.errors import Problem, RequestError

ProbeKind = Literal["paraphrase", "neighborhood", "generation"]


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


def parse_requests(entries: Iterable[EditRequest | Mapping[str, Any]], first: int = 0) -> list[EditRequest]:
    """Check a whole list and return it as requests.

    Args:
        entries: Requests, or mappings in our own schema, CounterFact's or zsRE's (MEND).
        first: Index that error messages give to the first entry.

    Returns:
        One request per entry, in order.

    Raises:
        RequestError: Listing every fault of every entry.
    """
    problems: list[Problem] = []
    requests: list[EditRequest] = []
    for index, entry in enumerate(entries, first):
        try:
            request = entry if isinstance(entry, EditRequest) else _from_mapping(entry)
        except _BadEntryError as bad:
            problems.append(Problem(index, bad.field, bad.value, bad.remedy))
            continue
        problems += (Problem(index, *fault) for fault in _faults(request))
        requests.append(request)
    if not requests and not problems:
        problems.append(Problem(first, "requests", [], "give at least one request"))
    if not problems:
        problems += _contradictions(requests, first)
    if problems:
        raise RequestError(problems)
    return requests


class _BadEntryError(Exception):
    """An entry that cannot even be read as a request."""

    def __init__(self, field: str, value: object, remedy: str) -> None:
        self.field, self.value, self.remedy = field, value, remedy


def _from_mapping(entry: object) -> EditRequest:
    if not isinstance(entry, Mapping):
        raise _BadEntryError("entry", entry, "give an EditRequest or a mapping with prompt, subject and target_new")
    if "requested_rewrite" in entry:
        return _from_counterfact(entry)
    if "src" in entry and "answers" in entry:
        return _from_zsre(entry)
    return _from_own(entry)


def _from_own(entry: Mapping[str, Any]) -> EditRequest:
    known = {field.name for field in fields(EditRequest)}
    if unknown := sorted(set(entry) - known - {"case_id"}, key=str):
        raise _BadEntryError(str(unknown[0]), entry[unknown[0]], f"unknown field; known: {', '.join(sorted(known))}")
    values = {name: entry[name] for name in known & set(entry)}
    for name in ("prompt", "subject", "target_new"):
        if name not in values:
            raise _BadEntryError(name, None, "missing; every request needs prompt, subject and target_new")
    probes = values.pop("probes", None) or ()
    if isinstance(probes, (str, Mapping)) or not isinstance(probes, Iterable):
        raise _BadEntryError("probes", probes, "give a list of {kind, prompt, expected}")
    return EditRequest(**values, probes=tuple(_probe(probe) for probe in probes))


def _probe(value: object) -> Probe:
    if isinstance(value, Probe):
        return value
    if not isinstance(value, Mapping) or not {"kind", "prompt"} <= set(value) <= {"kind", "prompt", "expected"}:
        raise _BadEntryError("probes", value, "a probe has kind, prompt and, optionally, expected")
    return Probe(**value)


def _need(entry: Mapping[str, Any], *path: str) -> Any:
    value: Any = entry
    for name in path:
        if not isinstance(value, Mapping) or name not in value:
            raise _BadEntryError(".".join(path), None, "missing in this schema")
        value = value[name]
    return value


def _texts(entry: Mapping[str, Any], name: str) -> list[str]:
    value = entry.get(name) or []
    if not isinstance(value, (list, tuple)):
        raise _BadEntryError(name, value, "give a list of prompts")
    return list(value)


def _from_counterfact(entry: Mapping[str, Any]) -> EditRequest:
    """One record of CounterFact (ROME, Meng et al. 2022), single or multi."""
    rewrite = _need(entry, "requested_rewrite")
    kinds: tuple[tuple[ProbeKind, str], ...] = (
        ("paraphrase", "paraphrase_prompts"),
        ("neighborhood", "neighborhood_prompts"),
        ("generation", "generation_prompts"),
    )
    return EditRequest(
        prompt=_need(rewrite, "prompt"),
        subject=_need(rewrite, "subject"),
        target_new=_need(rewrite, "target_new", "str"),
        target_true=_need(rewrite, "target_true", "str"),
        probes=tuple(Probe(kind, text) for kind, name in kinds for text in _texts(entry, name)),
        relation=rewrite.get("relation_id"),
    )


def _from_zsre(entry: Mapping[str, Any]) -> EditRequest:
    """One record of zsRE in MEND's schema: the new target is the gold answer, as in the official evaluation."""
    question, subject = _need(entry, "src"), _need(entry, "subject")
    answers = _texts(entry, "answers")
    if not isinstance(question, str) or not isinstance(subject, str) or subject not in question:
        raise _BadEntryError("subject", subject, "the subject must occur in src")
    if not answers:
        raise _BadEntryError("answers", answers, "give at least one answer")
    probes = [Probe("paraphrase", text) for text in [entry.get("rephrase")] if text]
    if entry.get("loc") and entry.get("loc_ans"):
        asked = entry["loc"] + "?" if isinstance(entry["loc"], str) else entry["loc"]
        probes.append(Probe("neighborhood", asked, entry["loc_ans"]))
    return EditRequest(question.replace(subject, "{}", 1), subject, answers[0], probes=tuple(probes))


def _faults(request: EditRequest) -> Iterator[tuple[str, object, str]]:
    """Everything wrong with one request, as (field, value, remedy)."""
    for name in ("prompt", "subject", "target_new"):
        yield from _text_faults(name, getattr(request, name))
    for name in ("target_true", "relation", "reference"):
        yield from _text_faults(name, getattr(request, name), optional=True)
    if isinstance(request.prompt, str) and request.prompt.count("{}") != 1:
        yield "prompt", request.prompt, f"needs exactly one {{}} for the subject, found {request.prompt.count('{}')}"
    if isinstance(request.subject, str) and request.subject != request.subject.strip():
        yield "subject", request.subject, "remove the white space around it"
    if request.target_new == request.target_true:
        yield "target_new", request.target_new, "equals target_true; there is nothing to edit"
    if not isinstance(request.probes, tuple) or not all(isinstance(probe, Probe) for probe in request.probes):
        yield "probes", request.probes, "must be a tuple of Probe"
    else:
        for probe in request.probes:
            yield from _probe_faults(probe)


def _text_faults(name: str, value: object, *, optional: bool = False) -> Iterator[tuple[str, object, str]]:
    if not isinstance(value, str):
        if value is not None or not optional:
            yield name, value, "must be a string"
    elif not value.strip():
        yield name, value, "must not be empty or blank"
    elif any("\ud800" <= character <= "\udfff" for character in value):
        yield name, value, "has a lone surrogate; give valid Unicode text"


def _probe_faults(probe: Probe) -> Iterator[tuple[str, object, str]]:
    if probe.kind not in get_args(ProbeKind):
        yield "probes.kind", probe.kind, f"must be one of {', '.join(get_args(ProbeKind))}"
    yield from _text_faults("probes.prompt", probe.prompt)
    yield from _text_faults("probes.expected", probe.expected, optional=True)


def _contradictions(requests: list[EditRequest], first: int) -> Iterator[Problem]:
    """Same subject and relation with two different new targets: no weights can satisfy both."""
    seen: dict[tuple[str, str], tuple[int, str]] = {}
    for index, request in enumerate(requests, first):
        key = (request.subject, request.relation or request.prompt)
        other, target = seen.setdefault(key, (index, request.target_new))
        if target.strip() != request.target_new.strip():
            remedy = f"contradicts entry {other} (same subject and relation, target {target!r}); keep one of them"
            yield Problem(index, "target_new", request.target_new, remedy)
