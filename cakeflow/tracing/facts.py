"""Facts that a model knows: what a trace can be run on."""

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
from cakeflow.errors import ConfigError, Fault, RequestError
from cakeflow.forward.generation import continuations
from cakeflow.forward.packing import pad, plan
from cakeflow.forward.tokens import Row, TextBatch, encode, join
from cakeflow.models.hooks import logits_at
from cakeflow.models.language import LanguageModel

ASKED_AT_ONCE = 128
"""Facts whose continuations are generated together."""

_CAPITAL = r"\b[A-Z\u00c0-\u00de]"
_CAPITALISED = re.compile(_CAPITAL)
_NAME = re.compile(rf"[^.,;:!?\n]*?({_CAPITAL}\w*(?: {_CAPITAL}\w*)*)")


@dataclass(frozen=True, slots=True)
class Fact:
    """Something that a model may know.

    Attributes:
        prompt: Text with exactly one ``{}`` where the subject goes.
        subject: What the fact is about.
        object: How the prompt goes on; where it is left empty, ``known_facts`` takes the name that the model gives.

    Example:
        >>> Fact("The capital of {} is", "France", "Paris").text
        'The capital of France is'
    """

    prompt: str
    subject: str
    object: str = ""

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace("{}", self.subject)

    @classmethod
    def of(cls, request: EditRequest) -> Fact:
        """What a request says is true today; its new target where it does not say."""
        return cls(request.prompt.strip(), request.subject, (request.target_true or request.target_new).strip())


@dataclass(frozen=True, slots=True)
class KnownFact:
    """A fact that a model states by itself.

    Attributes:
        fact: The fact, with its object.
        said: How the model goes on after the prompt, greedily.
        before: What it says before the object.
    """

    fact: Fact
    said: str
    before: str

    def to_dict(self, number: int) -> dict[str, Any]:
        """The fact in ROME's ``known_1000`` schema, which ``read_facts`` reads back.

        Args:
            number: Its ``known_id``.
        """
        fact = self.fact
        return {
            "known_id": number,
            "subject": fact.subject,
            "attribute": fact.object,
            "template": fact.prompt,
            "prediction": self.said,
            "prompt": join(fact.text, self.before) if self.before else fact.text,
        }


def read_facts(source: Any, split: str | None = None) -> list[Fact]:
    """Read facts from ROME's ``known_1000`` schema (subject, template, attribute) or from anything with requests.

    Args:
        source: As for ``read_requests``, or a list of ``Fact``. Of requests, ``target_true`` is the object; those
            without one are left out.
        split: Of a data set that has several.

    Raises:
        ConfigError: If there is no such source or split, or it cannot be reached.
        RequestError: Naming every entry that is no fact, or saying that none is left.
    """
    entries = read_entries(source, split)
    if entries and all(isinstance(entry, Fact) for entry in entries):
        return entries
    if entries and all(isinstance(entry, Mapping) and "attribute" in entry for entry in entries):
        return _from_known(entries)
    facts = [Fact.of(request) for request in parse_requests(entries) if request.target_true]
    if not facts:
        raise RequestError([Fault(0, "target_true", None, "a trace needs facts with a true target; none has one")])
    return facts


def _from_known(entries: Sequence[Mapping[str, Any]]) -> list[Fact]:
    _check_known(entries, ("template", "subject", "attribute"))
    return [Fact(entry["template"].strip(), entry["subject"], entry["attribute"].strip()) for entry in entries]


def open_facts(prompts: Sequence[str], subjects: Sequence[str]) -> list[Fact]:
    """Every prompt about every subject, to be completed by a model: facts without an object.

    Args:
        prompts: Texts with one ``{}`` each.
        subjects: What they are about.

    Raises:
        ConfigError: If there are only prompts or only subjects.
        RequestError: Naming every prompt and subject at fault.

    Example:
        >>> [fact.text for fact in open_facts(["The capital of {} is", "In {} they speak"], ["Peru"])]
        ['The capital of Peru is', 'In Peru they speak']
    """
    if not prompts or not subjects:
        raise ConfigError(f"facts are asked for with prompts and subjects; got prompts={prompts}, subjects={subjects}")
    entries = [{"template": prompt, "subject": subject} for subject, prompt in product(subjects, prompts)]
    _check_known(entries, ("template", "subject"))
    return [Fact(entry["template"].strip(), entry["subject"]) for entry in entries]


def _check_known(entries: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> None:
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


def trace_row(lm: LanguageModel, fact: Fact, said: str = "") -> Row:
    """A fact as tokens: prompt, what the model itself says before the object, object."""
    text = join(fact.text, said) if said else fact.text
    start = fact.prompt.index("{}")
    (row,) = encode(lm.tokenizer, [join(text, fact.object)], [start + len(fact.subject)], [len(text)], [start])
    return row


def known_rows(
    lm: LanguageModel, facts: Sequence[Fact], limit: int | None = None, tokens: int = 8
) -> tuple[list[Row], int]:
    """What ``known_facts`` finds, as tokens: what the model says before the object becomes part of the prompt.

    Args:
        lm: The model.
        facts: Facts to ask for, in order.
        limit: Stop once so many are known.
        tokens: Length of the continuation.

    Returns:
        Prompt and object of each known fact as a row with its subject marked, and how many facts were asked.

    Raises:
        RequestError: If the model knows none of them.
    """
    known, asked = known_facts(lm, facts, limit, tokens)
    return [trace_row(lm, each.fact, each.before) for each in known], asked


def known_facts(
    lm: LanguageModel, facts: Sequence[Fact], limit: int | None = None, tokens: int = 8
) -> tuple[list[KnownFact], int]:
    """The facts that the model states when it goes on greedily (CAKE, appendix E).

    A fact is known if the continuation names the object before any other capitalised word. A fact without an object
    takes the name that the continuation gives first; it is the model's own answer, right or wrong.

    Args:
        lm: The model.
        facts: Facts to ask for, in order.
        limit: Stop once so many are known.
        tokens: Length of the continuation.

    Returns:
        The known facts in order, and how many facts were asked.

    Raises:
        RequestError: If the model knows none of them.
    """
    known: list[KnownFact] = []
    for start in range(0, len(facts), ASKED_AT_ONCE):
        part = facts[start : start + ASKED_AT_ONCE]
        said = continuations(lm, [fact.text for fact in part], tokens)
        for asked, (fact, text) in enumerate(zip(part, said, strict=True), start + 1):
            fact = fact if fact.object else replace(fact, object=first_name(text))
            before = said_before(text, fact.object) if fact.object else None
            if before is not None:
                known.append(KnownFact(fact, text, before))
            if len(known) == limit:
                return known, asked
    if not known:
        remedy = "the model knows none of the facts; give some that it states by itself"
        raise RequestError([Fault(0, "facts", f"{len(facts)} facts", remedy)])
    return known, len(facts)


def first_name(text: str) -> str:
    """The first capitalised words of a text; empty if its first clause has none, or if the text ends with them.

    Example:
        >>> first_name(" the city of New York, where"), first_name(" a village. The"), first_name(" called New Yo")
        ('New York', '', '')
    """
    found = _NAME.match(text)
    return found[1] if found and found.end() < len(text) else ""


def said_before(text: str, wanted: str) -> str | None:
    """What a text says before it names something, or None if it does not, or names something else first.

    Example:
        >>> said_before(" the city of Paris, in France", "Paris"), said_before(" Rome, not Paris", "Paris")
        ('the city of', None)
    """
    found = re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text)
    before = text[: found.start()].strip() if found else ""
    return before if found and not _CAPITALISED.search(before) else None


@torch.no_grad()
def predicted_rows(lm: LanguageModel, batch: TextBatch, max_tokens: int = 8192) -> list[Row]:
    """The bare prompts of a batch, the model's own most likely next token in the object's place, as in ROME's code."""
    rows, said = [variants[0] for variants in batch.rows], dict[int, int]()
    for group in plan([row.target for row in rows], max_tokens):
        ids = pad([rows[i].ids[: rows[i].target] for i in group], lm.device)
        ends = torch.tensor([rows[i].target - 1 for i in group], device=lm.device)
        with logits_at(lm, torch.arange(len(group), device=lm.device), ends):
            logits = lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
        said |= dict(zip(group, logits.argmax(-1).tolist(), strict=True))
    return [replace(row, ids=(*row.ids[: row.target], said[i])) for i, row in enumerate(rows)]
