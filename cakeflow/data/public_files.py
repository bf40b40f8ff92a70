"""Public files about the consequences of edits, as they are: their facts, and the questions that follow from them.

KnowEdit (portability and locality), MQuAKE-CF (questions of several hops), PEAK (facts added to a list of true ones),
and ConflictEdit and RoundEdit ("Unveiling the Pitfalls of Knowledge Editing", ICLR 2024).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cakeflow.data.text import as_template
from cakeflow.errors import Fault, has_surrogate

TOPICS = {
    "reasoning": "reasoning",
    "Reasoning": "reasoning",
    "Logical_Generalization": "logic",
    "Subject_Aliasing": "aliases",
    "Relation_Specificity": "relations",
    "Forgetfulness": "forgetfulness",
}
"""KnowEdit's name of a group of questions -> topic."""
SIDES = ("portability", "locality")
"""Fields of KnowEdit's records that hold groups of questions."""
_NAME = re.compile(r"\w[\w .-]*")
DEEPEST = 4
"""Most lists around the right answers of a question."""


@dataclass(frozen=True)
class Consequence:
    """A question whose answer follows from edits, or should stay as it is.

    Attributes:
        topic: ``reasoning``, ``logic``, ``aliases``, ``relations``, ``forgetfulness`` or ``multi_hop``.
        prompts: Wordings of the question; it counts as answered if one of them is.
        answers: Texts that are right, aliases included.
        case: Place of the record in its file.
    """

    topic: str
    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    case: int


def unfold(entry: Mapping[str, Any]) -> list[Any]:
    """Return an entry of a public file as entries of our own schema, one for each edit; any other entry as it is.

    MQuAKE's records have up to four edits. ConflictEdit's have two that belong behind each other, RoundEdit's one and
    its way back, so these files need ``conflicts="keep"`` and batches of one.

    Example:
        >>> edit = {"relation": {"id": "P1", "prompt": "{} is in"}, "subject": {"label": "Lund"},
        ...         "object": {"label": "Peru"}, "new_object": {"label": "Chile"}}
        >>> [each["target_new"] for each in unfold({"edit": edit, "true_objects": []})]
        ['Chile', 'Peru']
    """
    if isinstance(entry.get("requested_rewrite"), list):
        return [_rewrite(entry, each) for each in entry["requested_rewrite"]]
    if "postive_list" in entry and isinstance(entry.get("requested_rewrite"), Mapping):
        return [_added(entry)]
    if isinstance(entry.get("edits"), list) and "triples" in entry:
        return [_from_triple(each) for each in entry["edits"]]
    if isinstance(entry.get("edit"), Mapping) and "true_objects" in entry:
        there = _from_triple(entry["edit"])
        back = {**entry["edit"], "new_object": entry["edit"].get("object"), "object": entry["edit"].get("new_object")}
        return [there, _from_triple(back)]
    if any(isinstance(_groups(entry, side), Mapping) for side in SIDES):
        return [_with_probes(entry)]
    return [entry]


def _groups(entry: Mapping[str, Any], side: str) -> Any:
    """Return KnowEdit's questions on a side of a record; zsRE's records (MEND) have texts of another kind there."""
    return None if "src" in entry else entry.get(side)


def shape_faults(entry: Mapping[str, Any], index: int) -> list[Fault]:
    """Return what keeps an entry of a public file from being read; nothing for entries of other schemas.

    Args:
        entry: The entry; texts, subjects and targets of its edits are checked as those of any request.
        index: Position of the entry in its list.
    """
    return [Fault(index, *fault) for fault in _shape_faults(entry)]


def _shape_faults(entry: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Yield field, value and remedy of each fault."""
    if "postive_list" in entry and isinstance(entry.get("requested_rewrite"), Mapping):
        yield from _faults_of_peak(entry)
    if "triples" in entry and not _is_list_of(Mapping, entry.get("edits")):
        yield "edits", entry["edits"], "give a list of {relation, subject, object, new_object}"
    if entry.get("questions") and entry.get("new_answer"):
        yield from _faults_of_mquake(entry)
    for side in SIDES:
        groups = _groups(entry, side)
        for name, group in groups.items() if isinstance(groups, Mapping) else ():
            if not _NAME.fullmatch(str(name)):
                yield side, name, "the name of a group becomes that of a metric; use letters, digits, '_', '.' and '-'"
            elif not _is_group(group):
                yield f"{side}.{name}", group, "give a list of {prompt, ground_truth}, or both as lists of valid texts"


def _faults_of_peak(entry: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    prompts, pairs = entry.get("para_add_prompts"), entry.get("neighborhood_prompts")
    if not _is_list_of(str, prompts):
        yield "para_add_prompts", prompts, "give a list of valid texts"
    if not (_is_list_of((list, tuple), pairs) and all(len(pair) == 2 for pair in pairs or ())):
        yield "neighborhood_prompts", pairs, "give a list of [prompt, answer]"


def _faults_of_mquake(entry: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    for name in ("questions", "new_answer_alias"):
        if not _is_list_of(str, entry.get(name)):
            yield name, entry[name], "give a list of valid texts"
    if not _is_list_of(str, [entry["new_answer"]]):
        yield "new_answer", entry["new_answer"], "give a valid text"


def _is_list_of(kind: Any, value: Any) -> bool:
    """True for None, and for a list of one kind; texts in it must be valid Unicode."""
    if value is None:
        return True
    parts = value if isinstance(value, (list, tuple)) else [None]
    return all(isinstance(each, kind) and not (isinstance(each, str) and has_surrogate(each)) for each in parts)


def _is_group(group: Any) -> bool:
    """True for questions in one of KnowEdit's forms; what a question lacks is left out when it is read."""
    if isinstance(group, Mapping):
        columns = [group.get(name) for name in ("prompt", "ground_truth")]
        if not all(each is None or isinstance(each, (list, tuple)) for each in columns):
            return False
    elif not _is_list_of(Mapping, group):
        return False
    return not any(has_surrogate(text) for pair in _questions(group) for part in pair for text in _texts(part))


def consequences(entries: Sequence[Any]) -> list[Consequence]:
    """Return the questions of KnowEdit's and MQuAKE's records, as they are in their files.

    Records of other schemas, and groups without questions, have none.

    Args:
        entries: Entries of a public file.
    """
    return [each for case, entry in enumerate(entries) if isinstance(entry, Mapping) for each in _of(entry, case)]


def _of(entry: Mapping[str, Any], case: int) -> Iterator[Consequence]:
    if entry.get("questions") and entry.get("new_answer"):
        answers = (entry["new_answer"], *(entry.get("new_answer_alias") or ()))
        yield Consequence("multi_hop", tuple(entry["questions"]), answers, case)
    for side in SIDES:
        for topic, prompt, answers in _pairs(_groups(entry, side)):
            yield Consequence(topic, (prompt,), answers, case)


def _pairs(groups: Any) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield topic, prompt and right answers of each question of KnowEdit's groups, in both of their forms."""
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        topic = TOPICS.get(name, str(name).lower())
        for prompt, truth in _questions(group):
            if isinstance(prompt, str) and (answers := _texts(truth)):
                yield topic, prompt, answers


def _questions(group: Any) -> list[tuple[Any, Any]]:
    """Return prompt and truth of each question of a group: of two lists, or of a list of records."""
    if isinstance(group, Mapping):
        return list(zip(group.get("prompt") or (), group.get("ground_truth") or (), strict=False))
    return [(each.get("prompt"), each.get("ground_truth")) for each in group or () if isinstance(each, Mapping)]


def _texts(value: Any, levels: int = DEEPEST) -> tuple[str, ...]:
    """Return the texts in a value: one, a list, or a list of lists."""
    if isinstance(value, str):
        return (value,) if value.strip() else ()
    parts = value if isinstance(value, (list, tuple)) and levels else ()
    return tuple(text for each in parts for text in _texts(each, levels - 1))


def _rewrite(entry: Mapping[str, Any], rewrite: Any) -> dict[str, Any]:
    """Return one of the edits of a record of MQuAKE."""
    if not isinstance(rewrite, Mapping):
        return {"requested_rewrite": rewrite}
    probe = {"kind": "paraphrase", "prompt": rewrite.get("question")}
    return _request(
        prompt=rewrite.get("prompt"),
        subject=rewrite.get("subject"),
        target_new=_label(rewrite.get("target_new"), "str"),
        target_true=_label(rewrite.get("target_true"), "str"),
        relation=rewrite.get("relation_id"),
        case_id=entry.get("case_id"),
        probes=[probe] if probe["prompt"] else None,
    )


def _added(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record of PEAK, whose neighborhood prompts have answers of their own."""
    pairs = entry.get("neighborhood_prompts") or ()
    probes = [{"kind": "paraphrase", "prompt": text} for text in entry.get("para_add_prompts") or ()]
    probes += [{"kind": "neighborhood", "prompt": prompt, "expected": answer} for prompt, answer in pairs]
    return {**_rewrite(entry, entry["requested_rewrite"]), "probes": probes}


def _from_triple(edit: Mapping[str, Any]) -> dict[str, Any]:
    """Return an edit of ConflictEdit or RoundEdit."""
    relation = edit.get("relation") or {}
    return _request(
        prompt=_label(relation, "prompt"),
        subject=_label(edit.get("subject"), "label"),
        target_new=_label(edit.get("new_object"), "label"),
        target_true=_label(edit.get("object"), "label"),
        relation=_label(relation, "id"),
    )


def _with_probes(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record of KnowEdit; other names of the subject are paraphrases, what should stay are neighbors."""
    probes = [{"kind": "paraphrase", "prompt": text} for text in _texts(entry.get("rephrase"))]
    for side, topic, kind in (
        ("portability", "aliases", "paraphrase"),
        ("locality", "relations", "neighborhood"),
        ("locality", "forgetfulness", "neighborhood"),
    ):
        pairs = [pair for pair in _pairs(entry.get(side)) if pair[0] == topic]
        probes += [{"kind": kind, "prompt": prompt, "expected": answers[0]} for _, prompt, answers in pairs]
    truth, subject = _texts(entry.get("ground_truth"))[:1], entry.get("subject")
    subject = subject.strip() if isinstance(subject, str) else subject  # two of KnowEdit's end with a space
    return _request(
        prompt=_as_template(entry.get("prompt"), subject),
        subject=subject,
        target_new=entry.get("target_new"),
        target_true=truth[0] if truth else None,
        case_id=entry.get("case_id"),
        probes=probes,
    )


def _as_template(prompt: Any, subject: Any) -> Any:
    """Return a prompt with ``{}`` for the first occurrence of its subject, as zsRE's questions are read."""
    are_texts = isinstance(prompt, str) and isinstance(subject, str)
    return as_template(prompt, subject, "first") if are_texts else prompt


def _label(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else value


def _request(**fields: Any) -> dict[str, Any]:
    """Return the fields that have a value, but no true target that equals the new one: published files have such."""
    if fields.get("target_true") == fields.get("target_new"):
        fields["target_true"] = None
    return {name: value for name, value in fields.items() if value is not None}
