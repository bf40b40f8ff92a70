"""Schemas of entries: ours, CounterFact's and zsRE's, parsed into edit requests."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, Literal

from cakeflow.data.images import FIELDS, ImageEditRequest, image_faults, image_request
from cakeflow.data.request import EditRequest, Probe, ProbeKind, normal_form_hint, request_faults
from cakeflow.data.text import Occurrence, as_template, occurrences
from cakeflow.errors import Fault, RequestError, require_choice

ZsreTarget = Literal["answers", "alt"]
"""Field of zsRE's records that has the new target: the gold answers, of which the first is taken, or another one."""

NEEDS = "missing; every request needs prompt, subject and target_new"
FORGET = f"{NEEDS}; to have a fact forgotten, name what the model should say instead, such as 'unknown'"

log = logging.getLogger(__name__)


def parse_requests(
    entries: Iterable[EditRequest | Mapping[str, Any]],
    *,
    occurrence: Occurrence | None = None,
    zsre_target: ZsreTarget = "answers",
) -> list[EditRequest]:
    """Check every entry of a list and return them as requests.

    Contradictions are not checked here, but among the requests that are edited (see ``contradictions``).

    Args:
        entries: Requests, or mappings in our own schema, that of images, CounterFact's or zsRE's (MEND); a field of
            None counts as missing. A prompt without ``{}`` becomes a template where it contains the subject as whole
            words.
        occurrence: Occurrence of the subject that such a prompt means, ``first`` or ``last``. None takes the first
            in zsRE, and refuses a prompt of our own schema with several.
        zsre_target: Field of zsRE's records with the new target: ``answers`` (the first one, as in the official
            evaluation) or ``alt`` (MEND's edit target).

    Returns:
        One request per entry, in order.

    Raises:
        RequestError: Listing every fault of every entry.
        ConfigError: If a setting is none of its choices.
    """
    if occurrence is not None:
        require_choice("occurrence", occurrence, Occurrence)
    require_choice("zsre_target", zsre_target, ZsreTarget)
    faults: list[Fault] = []
    questions = 0
    requests: list[EditRequest] = []
    for index, entry in enumerate(entries):
        try:
            request = entry if isinstance(entry, EditRequest) else _from_mapping(entry, occurrence, zsre_target)
        except _BadEntryError as bad:
            faults.append(Fault(index, bad.field, bad.value, bad.remedy))
            continue
        own = image_faults(request, index) if isinstance(request, ImageEditRequest) else []
        faults += own or request_faults(request, index)
        requests.append(request)
        questions += asks(entry)
    if not requests and not faults:
        faults.append(Fault(0, "requests", [], "give at least one request"))
    if faults:
        raise RequestError(faults)
    if questions:
        label = "the first of answers" if zsre_target == "answers" else zsre_target
        log.info("%d records of zsRE: their target_new is %s (zsre_target)", questions, label)
    return requests


def asks(entry: object) -> bool:
    """Return whether an entry is of a schema whose prompts are questions: zsRE's."""
    return isinstance(entry, Mapping) and entry.get("src") is not None


class _BadEntryError(Exception):
    """An entry that cannot be parsed into a request."""

    def __init__(self, field: str, value: object, remedy: str) -> None:
        self.field, self.value, self.remedy = field, value, remedy


def _from_mapping(entry: object, occurrence: Occurrence | None, zsre_target: ZsreTarget) -> EditRequest:
    if not isinstance(entry, Mapping):
        raise _BadEntryError("entry", entry, "give an EditRequest or a mapping with prompt, subject and target_new")
    # a data set of several schemas gives each record every column, most of them None
    entry = {name: value for name, value in entry.items() if value is not None}
    if "requested_rewrite" in entry:
        return _from_counterfact(entry)
    if "image" in entry:
        return _from_image(entry)
    if "src" in entry:
        return _from_zsre(entry, occurrence or "first", zsre_target)
    return _from_own(entry, occurrence)


def _from_image(entry: Mapping[str, Any]) -> ImageEditRequest:
    if unknown := sorted(set(map(str, entry)) - set(FIELDS)):
        raise _BadEntryError(unknown[0], entry.get(unknown[0]), f"unknown field; known: {', '.join(FIELDS)}")
    if "label" not in entry:
        raise _BadEntryError("label", None, "missing; an image request needs image and label")
    try:
        return image_request(entry)
    except (KeyError, TypeError, AttributeError) as error:
        raise _BadEntryError("probes", entry.get("probes"), "give a list of {kind, image, label}") from error


def _from_own(entry: Mapping[str, Any], occurrence: Occurrence | None) -> EditRequest:
    names, required = {field.name for field in fields(EditRequest)}, ("prompt", "subject", "target_new")
    if not set(required) & set(entry):
        remedy = f"{NEEDS}, or CounterFact's or zsRE's (MEND) fields"
        raise _BadEntryError("prompt", None, f"{remedy}; found {sorted(map(str, entry))}")
    if unknown := sorted(set(entry) - names, key=str):
        raise _BadEntryError(str(unknown[0]), entry[unknown[0]], f"unknown field; known: {', '.join(sorted(names))}")
    values = {name: entry[name] for name in names & set(entry)}
    prompt, subject = values.get("prompt"), values.get("subject")
    if isinstance(prompt, str) and isinstance(subject, str) and "{}" not in prompt:
        values["prompt"] = as_template(prompt, subject, occurrence)
    for name in required:
        if name not in values:
            raise _BadEntryError(name, None, FORGET if name == "target_new" else NEEDS)
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
    """Parse a record of CounterFact (ROME, Meng et al. 2022), single or multi."""
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
        reference=entry.get("reference"),
        case_id=entry.get("case_id"),
    )


def _from_zsre(entry: Mapping[str, Any], occurrence: Occurrence, zsre_target: ZsreTarget) -> EditRequest:
    """Parse a record of zsRE in MEND's schema."""
    question, subject = _need(entry, "src"), _need(entry, "subject")
    if not isinstance(question, str) or not isinstance(subject, str) or not occurrences(question, subject):
        inside = isinstance(question, str) and isinstance(subject, str) and subject.strip() and subject in question
        hint = ", not inside a longer word" if inside else normal_form_hint(question, subject)
        raise _BadEntryError("subject", subject, f"the subject must occur in src{hint}")
    answers = _texts(entry, "answers") if zsre_target == "answers" else [_need(entry, "alt")]
    if not answers:
        raise _BadEntryError("answers", answers, "give at least one answer")
    probes = [Probe("paraphrase", text) for text in [entry.get("rephrase")] if text]
    if entry.get("loc") and entry.get("loc_ans"):
        prompt = entry["loc"] + "?" if isinstance(entry["loc"], str) else entry["loc"]
        probes.append(Probe("neighborhood", prompt, entry["loc_ans"]))
    prompt = as_template(question, subject, occurrence)
    return EditRequest(prompt, subject, answers[0], probes=tuple(probes), case_id=entry.get("case_id"))
