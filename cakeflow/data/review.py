"""Review of the requests of a run before the work: fields that metrics need, and what is probably not meant."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import chain

import regex

from cakeflow.data.normal_forms import normal_forms
from cakeflow.data.request import EditRequest
from cakeflow.data.text import until_stop
from cakeflow.errors import ConfigError, RequestWarning, listed

FIELDS: Mapping[str, Callable[[EditRequest], bool]] = {
    "target_true": lambda record: record.target_true is not None,
    "reference": lambda record: record.reference is not None,
    "paraphrase": lambda record: any(probe.kind == "paraphrase" for probe in record.probes),
    "generation": lambda record: any(probe.kind == "generation" for probe in record.probes),
    "neighborhood": lambda record: any(
        probe.kind == "neighborhood" and (probe.expected or record.target_true) for probe in record.probes
    ),
}
"""Field -> test for it in a record: one probe of a kind is enough, and a neighborhood probe needs an answer."""
WORDS = 12
"""Most words of a target that is no paragraph."""
LETTERS = 5
"""Least letters of a word in which one of them is likelier to be a slip than to make another name."""

_QUESTION = regex.compile(r"[?\uff1f\u061f\u037e][\p{Pe}\p{Pf}\"'\s]*\Z")
_DOTS = regex.compile(r"(?<=\p{L})[.'\u2019](?=\p{L}|\s|\Z)")
"""Full stops of initials and apostrophes: U.S. is US."""
_GAP = regex.compile(r"(?<!\d) | (?!\d)")
"""A space that is not between two numbers."""
_WORD = regex.compile(r"[\w\p{S}#&@%*]+")
_ARTICLES = ("a", "an", "the")
_POSSESSIVE = regex.compile(r"\{\}['\u2019]s?(?!\w)|of \{\}(?!\w)")
"""Two ways to write a genitive."""
_FILLERS = (*_ARTICLES, "is", "are")

log = logging.getLogger(__name__)


# ---- fields that metrics need ----


def missing_fields(requests: Sequence[EditRequest], needs: Collection[str] = tuple(FIELDS)) -> dict[str, set[int]]:
    """Return the records that lack a field.

    Args:
        requests: Records to check.
        needs: Fields to look for, names of ``FIELDS``.

    Returns:
        Field -> indices of the records that lack it; fields that all records have are left out.

    Example:
        >>> facts = [EditRequest("{} is", "Ann", "tall", "small"), EditRequest("{} is", "Bob", "tall")]
        >>> missing_fields(facts, ["target_true", "paraphrase"])
        {'target_true': {1}, 'paraphrase': {0, 1}}

    Raises:
        ConfigError: If a field is unknown.
    """
    if unknown := sorted(set(needs) - set(FIELDS)):
        raise ConfigError(f"no field {unknown[0]!r} that a metric could need; there are {', '.join(FIELDS)}")
    lacking = {field: {i for i, request in enumerate(requests) if not FIELDS[field](request)} for field in needs}
    return {field: records for field, records in lacking.items() if records}


def check_fields(
    requests: Sequence[EditRequest], needs: Mapping[str, Collection[str]], explicit: Collection[str] = ()
) -> None:
    """Check which metrics can judge which records.

    Args:
        requests: The records that will be scored.
        needs: Metric -> the fields that a record must have, all of them, for this metric to judge it.
        explicit: Metrics that the user named. One of these that can judge no record is an error; any other such metric
            is ignored. A metric that can judge only some records is logged as a warning.

    Raises:
        ConfigError: Naming each metric that can judge no record, and the fields that are missing.
    """
    useless: list[str] = []
    short: list[str] = []
    for metric, fields in needs.items():
        lacking = missing_fields(requests, fields)
        if lacking:
            counts = ", ".join(f"{field} is missing in {len(records)}" for field, records in lacking.items())
            nothing = len(set.union(*lacking.values())) == len(requests)
            if metric in explicit or not nothing:
                (useless if nothing else short).append(f"{metric}: {counts} of {len(requests)} records")
    if useless:
        raise ConfigError(f"no record can feed {'; '.join(useless)}; add the fields, or leave the metric out")
    if short:
        log.warning("some metrics cannot judge every record: %s", "; ".join(short))


# ---- what can be edited but is probably not meant as it stands ----


def warn_of_doubts(
    requests: Sequence[EditRequest], may_ask: Collection[EditRequest] = (), *, may_contradict: bool = False
) -> None:
    """Warn of requests that are probably not meant as they stand, in one line for each kind of doubt.

    Args:
        requests: The requests of a run, in the order of the edits.
        may_ask: Requests of data whose prompts are questions.
        may_contradict: Whether later requests are meant to replace earlier ones.
    """
    twins = _twins([request.subject for request in requests])
    doubts = (
        _repeated(requests), _questions(requests, may_ask), _long(requests), _respelled(requests, twins),
        () if may_contradict else _contradictory(requests, twins),
    )  # fmt: skip
    for message in chain(*doubts):
        warnings.warn(message, RequestWarning, stacklevel=3)


def _repeated(requests: Sequence[EditRequest]) -> Iterator[str]:
    """Requests that occur twice: published files have such, and their tables count them twice."""
    first: dict[tuple[str, str, str], int] = {}
    edits = [(request.prompt, request.subject, request.target_new) for request in requests]
    repeated = [f"{i} (as {first[edit]})" for i, edit in enumerate(edits) if first.setdefault(edit, i) != i]
    if repeated:
        yield (
            f"records that repeat an earlier one, prompt, subject and target_new: {listed(repeated)} (numbered from 0, "
            "in the order of the edits); each counts once more in edit and metrics, leave it out if that is not meant"
        )


def _questions(requests: Sequence[EditRequest], may_ask: Collection[EditRequest]) -> Iterator[str]:
    """Prompts that are questions, but for requests that may ask."""
    doubtful = [i for i, each in enumerate(requests) if _QUESTION.search(each.prompt) and each not in may_ask]
    yield from _line(
        {i: _quoted(requests[i].text) for i in doubtful},
        f"of {len(requests)} prompts are questions",
        "a model goes on from a prompt, it does not answer: write the beginning of a sentence that the target ends, "
        "'Google was founded by' for 'Who founded Google?'",
    )


def _long(requests: Sequence[EditRequest]) -> Iterator[str]:
    """Targets that end a sentence, or are paragraphs."""
    targets = [request.target_new.strip() for request in requests]
    yield from _line(
        {i: _quoted(each) for i, each in enumerate(targets) if len(each.split()) > WORDS or _ends_sentence(each)},
        f"of {len(requests)} targets end a sentence or have more than {WORDS} words",
        "a target is the few words that the prompt lacks: leave out the full stop, and give each fact a request",
    )


def _ends_sentence(text: str) -> bool:
    """Return True if a sentence ends in a text; the full stop of an abbreviation at its end does not."""
    further = f"{text} x"  # a small letter: the sentence goes on unless the stop can only be its end
    return len(until_stop(further)) < len(further)


def _respelled(requests: Sequence[EditRequest], twins: Sequence[int]) -> Iterator[str]:
    """Subjects that differ from an earlier one as two spellings of a name do."""
    subjects = [request.subject for request in requests]
    pairs = {i: twin for i, twin in enumerate(twins) if subjects[twin] != subjects[i]}
    yield from _line(
        {i: f"{_quoted(subjects[i])}, as {twin}: {_quoted(subjects[twin])}" for i, twin in pairs.items()},
        f"of {len(requests)} subjects look like an earlier one in another spelling",
        "a model may hold them apart, so each is edited by itself: write a subject one way, unless they are different",
    )


def _twins(subjects: Sequence[str]) -> list[int]:
    """For each subject the first one that has a spelling in common with it; itself, if there is none."""
    first: dict[tuple[str, ...], int] = {}
    twin_of: dict[str, int] = {}
    for i, subject in enumerate(subjects):
        if subject not in twin_of:
            spellings = list(_spellings(subject))
            twin_of[subject] = min((first[each] for each in spellings if each in first), default=i)
            for each in spellings:
                first.setdefault(each, twin_of[subject])
    return [twin_of[subject] for subject in subjects]


def _spellings(subject: str) -> Iterator[tuple[str, ...]]:
    """Yield forms of a subject of which another spelling has at least one as well.

    They are its letters, its words in any order and, where it has several, these with a letter of one left out: two
    words that differ by a letter, or by two in each other's place, are then the same.
    """
    words = [word for word in _words(subject) if word not in _ARTICLES] or [subject]
    yield ("letters", _GAP.sub("", " ".join(words)))
    yield ("words", *sorted(words))
    for i, word in enumerate(words if len(words) > 1 else ()):
        if len(word) >= LETTERS and word.isalpha():
            yield ("slip", *words)
            yield from (("slip", *words[:i], word[:at] + word[at + 1 :], *words[i + 1 :]) for at in range(len(word)))


def _words(text: str) -> list[str]:
    words: list[str] = _WORD.findall(_DOTS.sub("", normal_forms(text)[1]))
    return words


def _contradictory(requests: Sequence[EditRequest], twins: Sequence[int]) -> Iterator[str]:
    """Requests whose target differs from an earlier one's of the same subject, to a prompt that says the same."""
    first: dict[tuple[int, str], int] = {}
    pairs: dict[int, int] = {}
    for i, request in enumerate(requests):
        for wording in _wordings(request):
            other = first.setdefault((twins[i], wording), i)
            if other != i and _words(requests[other].target_new) != _words(request.target_new):
                pairs.setdefault(i, other)
    yield from _line(
        {i: f"{_fact(requests[i])}, as {other}: {_fact(requests[other])}" for i, other in pairs.items()},
        f"of {len(requests)} requests contradict an earlier one in other words",
        "one subject, prompts or paraphrases that say the same, and two targets: keep one of them",
    )


def _wordings(request: EditRequest) -> set[str]:
    """Return what the requests have in common that say the same: relation, and words of prompt and paraphrases."""
    paraphrases = [each.prompt for each in request.probes if each.kind == "paraphrase" and each.expected is None]
    templates = [request.prompt, *(text.replace(request.subject, "{}") for text in paraphrases)]
    named = {f"relation {request.relation}"} if request.relation else set()
    return named | {_wording(template) for template in templates}


def _wording(template: str) -> str:
    """Return the words of a prompt in any order, without those that say nothing; case and punctuation aside."""
    text = _POSSESSIVE.sub(" \ue000 ", normal_forms(template)[1]).replace("{}", " \ue001 ")
    words = regex.findall(r"[\w\ue000\ue001]+", text)
    telling = sorted(word for word in words if word not in _FILLERS)
    return " ".join(telling if len(telling) > 1 else words)


def _line(doubts: dict[int, str], count: str, remedy: str) -> Iterator[str]:
    """Yield the message about some requests, if there are any: number, the first three, and a remedy.

    Args:
        doubts: Place of each request in the order of the edits -> what is to be said of it.
        count: What follows the number of them.
        remedy: Advice.
    """
    if doubts:
        places = listed([f"{i} ({text})" for i, text in doubts.items()], most=3)
        yield f"{len(doubts)} {count}: {places} (numbered from 0, in the order of the edits); {remedy}"


def _fact(request: EditRequest) -> str:
    return f"{_quoted(request.text)} -> {_quoted(request.target_new)}"


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
