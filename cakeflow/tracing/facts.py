"""Facts that a model knows: the input of traces."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from cakeflow.data.request import EditRequest
from cakeflow.data.schemas import parse_requests
from cakeflow.data.sources import read_entries
from cakeflow.data.text import join, occurrences, until_stop
from cakeflow.errors import ConfigError, Fault, RequestError, require_count
from cakeflow.forward.generation import continuations
from cakeflow.forward.packing import logits_bytes, pad, pass_bytes, plan, require_bytes
from cakeflow.forward.tokens import Row, TextBatch, encode
from cakeflow.models.hooks import logits_at
from cakeflow.models.language import LanguageModel

CHUNK = 128
"""Number of facts whose continuations are generated together."""

_CAPITAL = r"\b[A-Z\u00c0-\u00de]"
_CAPITALISED = re.compile(_CAPITAL)
_NAME = re.compile(rf"[^,;:!?]*?({_CAPITAL}\w*(?:\.? ?{_CAPITAL}\w*)*)")


@dataclass(frozen=True, slots=True)
class Fact:
    """A fact that a model may know.

    Attributes:
        prompt: Text with exactly one ``{}`` in place of the subject.
        subject: Subject of the fact.
        object: Continuation of the prompt; if it is empty, ``known_facts`` fills in the model's own answer.
        space: Whether a space stands before the object; None lets the texts decide.

    Example:
        >>> Fact("The capital of {} is", "France", "Paris").text
        'The capital of France is'
    """

    prompt: str
    subject: str
    object: str = ""
    space: bool | None = None

    @property
    def text(self) -> str:
        """Prompt with the subject filled in."""
        return self.prompt.replace("{}", self.subject)

    @classmethod
    def of(cls, request: EditRequest) -> Fact:
        """Return the fact behind a request: its true target, or its new target where it has none."""
        target = (request.target_true or request.target_new).strip()
        return cls(request.prompt.strip(), request.subject, target, request.space)


@dataclass(frozen=True, slots=True)
class KnownFact:
    """A fact that a model states by itself.

    Attributes:
        fact: The fact, with its object.
        continuation: The model's greedy continuation of the prompt.
        before: The part of the continuation before the object.
    """

    fact: Fact
    continuation: str
    before: str

    def to_dict(self, number: int) -> dict[str, Any]:
        """Return the fact in ROME's ``known_1000`` schema, which ``read_facts`` reads back.

        Args:
            number: The ``known_id``.
        """
        fact = self.fact
        return {
            "known_id": number,
            "subject": fact.subject,
            "attribute": fact.object,
            "template": fact.prompt,
            "prediction": self.continuation,
            "prompt": join(fact.text, self.before, fact.space) if self.before else fact.text,
        }


def read_facts(source: Any, split: str | None = None) -> list[Fact]:
    """Read facts from ROME's ``known_1000`` schema (subject, template, attribute) or from anything with requests.

    Args:
        source: A source for ``read_requests``, or a list of ``Fact``. The object of a request is its ``target_true``;
            requests without one are skipped.
        split: Split of a data set.

    Raises:
        ConfigError: If there is no such source or split, or it cannot be reached.
        RequestError: If an entry is no fact (all are named), or none has a true target.
    """
    entries = read_entries(source, split)
    if entries and all(isinstance(entry, Fact) for entry in entries):
        return entries
    if entries and all(isinstance(entry, Mapping) and "attribute" in entry for entry in entries):
        return _from_template(entries)
    facts = [Fact.of(request) for request in parse_requests(entries) if request.target_true]
    if not facts:
        raise RequestError([Fault(0, "target_true", None, "a trace needs facts with a true target; none has one")])
    return facts


def _from_template(entries: Sequence[Mapping[str, Any]]) -> list[Fact]:
    _check_fields(entries, ("template", "subject", "attribute"))
    return [Fact(entry["template"].strip(), entry["subject"], entry["attribute"].strip()) for entry in entries]


def open_facts(prompts: Sequence[str], subjects: Sequence[str]) -> list[Fact]:
    """Combine every prompt with every subject: facts without an object, for a model to complete.

    Args:
        prompts: Texts with one ``{}`` each.
        subjects: Subjects of the facts.

    Raises:
        ConfigError: If there are only prompts or only subjects.
        RequestError: If prompts or subjects are faulty (all are named).

    Example:
        >>> [fact.text for fact in open_facts(["The capital of {} is", "In {} they speak"], ["Peru"])]
        ['The capital of Peru is', 'In Peru they speak']
    """
    if not prompts or not subjects:
        raise ConfigError(f"facts need both prompts and subjects; got prompts={prompts}, subjects={subjects}")
    entries = [{"template": prompt, "subject": subject} for subject, prompt in product(subjects, prompts)]
    _check_fields(entries, ("template", "subject"))
    return [Fact(entry["template"].strip(), entry["subject"]) for entry in entries]


def _check_fields(entries: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> None:
    problems = []
    for index, entry in enumerate(entries):
        for field in fields:
            value = entry.get(field)
            if not isinstance(value, str) or not value.strip():
                problems.append(Fault(index, field, value, "give a text that is not empty"))
            elif field == "template" and value.count("{}") != 1:
                problems.append(Fault(index, field, value, "needs exactly one {} for the subject"))
    if problems:
        raise RequestError(problems)


def trace_row(lm: LanguageModel, fact: Fact, before: str = "") -> Row:
    """Tokenise a fact: prompt, the model's own words before the object, object."""
    text = join(fact.text, before, fact.space) if before else fact.text
    start = fact.prompt.index("{}")
    (row,) = encode(
        lm.tokenizer, [join(text, fact.object, fact.space)], [start + len(fact.subject)], [len(text)], [start]
    )
    return row


def known_rows(
    lm: LanguageModel,
    facts: Sequence[Fact],
    limit: int | None = None,
    tokens: int = 8,
    max_bytes: float | None = None,
) -> tuple[list[Row], int]:
    """Tokenise the result of ``known_facts``; the model's words before the object become part of the prompt.

    Args:
        lm: The model.
        facts: Candidate facts, in order.
        limit: Largest number of rows.
        tokens: Length of the continuation.
        max_bytes: Most bytes beyond the model.

    Returns:
        Prompt and object of each fact that the model knows as a row with its subject marked, and the number of
        candidates tried.

    Raises:
        RequestError: If the model knows none of them.
        ConfigError: If the longest text does not fit ``max_bytes``.
    """
    matches, tried = known_facts(lm, facts, limit, tokens, max_bytes)
    return [trace_row(lm, match.fact, match.before) for match in matches], tried


def known_facts(
    lm: LanguageModel,
    facts: Sequence[Fact],
    limit: int | None = None,
    tokens: int = 8,
    max_bytes: float | None = None,
) -> tuple[list[KnownFact], int]:
    """Select the facts that the model states in its greedy continuation (CAKE, appendix E).

    A fact counts as known if the continuation names the object before any other capitalised word. A fact without an
    object takes the first name in the continuation, which is the model's own answer, right or wrong.

    Args:
        lm: The model.
        facts: Candidate facts, in order.
        limit: Largest number of facts to return.
        tokens: Length of the continuation.
        max_bytes: Most bytes beyond the model.

    Returns:
        The facts that the model knows, in order, and the number of candidates tried.

    Raises:
        RequestError: If the model knows none of them.
        ConfigError: If the longest text does not fit ``max_bytes``, or the limit is below 1.
    """
    require_count("limit", limit, 1, optional=True)
    matches: list[KnownFact] = []
    for start in range(0, len(facts), CHUNK):
        part = facts[start : start + CHUNK]
        texts = continuations(lm, [fact.text for fact in part], tokens, max_bytes=max_bytes)
        for tried, (fact, text) in enumerate(zip(part, texts, strict=True), start + 1):
            fact = fact if fact.object else replace(fact, object=first_name(text))
            before = text_before(text, fact.object) if fact.object else None
            if before is not None:
                matches.append(KnownFact(fact, text, before))
            if len(matches) == limit:
                return matches, tried
    if not matches:
        remedy = "the model knows none of the facts; give some that it states by itself"
        raise RequestError([Fault(0, "facts", f"{len(facts)} facts", remedy)])
    return matches, len(facts)


def first_name(text: str) -> str:
    """Return the first capitalised words of a text; empty if its first clause has none, or if the text ends with them.

    Example:
        >>> first_name(" the city of New York, where"), first_name(" a village. The"), first_name(" called New Yo")
        ('New York', '', '')
        >>> first_name(" in St. Petersburg, which")
        'St. Petersburg'
    """
    match = _NAME.match(until_stop(text))
    return match[1] if match and match.end() < len(text) else ""  # a name at the very end may be cut off


def text_before(text: str, name: str) -> str | None:
    """Return the text before a name, or None if the name is absent or another one comes first.

    Example:
        >>> text_before(" the city of Paris, in France", "Paris"), text_before(" Rome, not Paris", "Paris")
        ('the city of', None)
    """
    places = occurrences(text, name)
    before = text[: places[0]].strip() if places else ""
    return before if places and not _CAPITALISED.search(before) else None


@torch.no_grad()
def predicted_rows(
    lm: LanguageModel, batch: TextBatch, max_tokens: int = 8192, max_bytes: float | None = None
) -> list[Row]:
    """Return a batch's bare prompts with the model's most likely next token as the object, as in ROME's code.

    Args:
        lm: The model.
        batch: The facts.
        max_tokens: Most tokens in one forward pass.
        max_bytes: Most bytes beyond the model.

    Raises:
        ConfigError: If the longest prompt does not fit ``max_bytes``.
    """
    rows, answers = [variants[0] for variants in batch.rows], dict[int, int]()
    if max_bytes is not None:
        needed = [row.target * pass_bytes(lm) + logits_bytes(lm) for row in rows]
        require_bytes(max_bytes, max(needed, default=0), "reading a prompt")
        dearest = max((each / row.target for each, row in zip(needed, rows, strict=True)), default=1)
        max_tokens = min(max_tokens, int(max_bytes / dearest))
    for group in plan([row.target for row in rows], max_tokens):
        ids = pad([rows[i].ids[: rows[i].target] for i in group], lm.device)
        ends = torch.tensor([rows[i].target - 1 for i in group], device=lm.device)
        with logits_at(lm, torch.arange(len(group), device=lm.device), ends):
            logits = lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
        answers |= dict(zip(group, logits.argmax(-1).tolist(), strict=True))
    return [replace(row, ids=(*row.ids[: row.target], answers[i])) for i, row in enumerate(rows)]
