"""Facts that a model knows: what a trace can be run on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cakeflow.batch import EditBatch, Row, encode, join, pad, plan
from cakeflow.data.readers import read_entries, read_requests
from cakeflow.errors import Problem, RequestError
from cakeflow.generation import continuations
from cakeflow.model import LanguageModel
from cakeflow.request import EditRequest
from cakeflow.tap import narrow

ASKED_AT_ONCE = 128
"""Facts whose continuations are generated together."""

_CAPITALISED = re.compile(r"\b[A-Z\u00c0-\u00de]")


@dataclass(frozen=True, slots=True)
class Fact:
    """Something that a model may know.

    Attributes:
        prompt: Text with exactly one ``{}`` where the subject goes.
        subject: What the fact is about.
        object: How the prompt goes on.

    Example:
        >>> Fact("The capital of {} is", "France", "Paris").text
        'The capital of France is'
    """

    prompt: str
    subject: str
    object: str

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace("{}", self.subject)

    @classmethod
    def of(cls, request: EditRequest) -> Fact:
        """What a request says is true today; its new target where it does not say."""
        return cls(request.prompt, request.subject, request.target_true or request.target_new)


def read_facts(source: Any) -> list[Fact]:
    """Read facts from ROME's ``known_1000`` schema (subject, template, attribute) or from anything with requests.

    Args:
        source: As for ``read_requests``, or a list of ``Fact``. Of requests, ``target_true`` is the object; those
            without one are left out.

    Raises:
        RequestError: Naming every entry that is no fact, or saying that none is left.
    """
    entries = read_entries(Path(source)) if isinstance(source, (str, Path)) and source != "builtin" else source
    if isinstance(entries, Iterable) and not isinstance(entries, (str, Mapping)):
        entries = list(entries)
        if entries and all(isinstance(entry, Fact) for entry in entries):
            return list(entries)
        if entries and all(isinstance(entry, Mapping) and "attribute" in entry for entry in entries):
            return _from_known(entries)
    facts = [Fact.of(request) for request in read_requests(entries) if request.target_true]
    if not facts:
        raise RequestError([Problem(0, "target_true", None, "a trace needs facts with a true target; none has one")])
    return facts


def _from_known(entries: Sequence[Mapping[str, Any]]) -> list[Fact]:
    problems = []
    for index, entry in enumerate(entries):
        for field in ("template", "subject", "attribute"):
            value = entry.get(field)
            if not isinstance(value, str) or not value.strip():
                problems.append(Problem(index, field, value, "give a text that is not empty"))
            elif field == "template" and value.count("{}") != 1:
                problems.append(Problem(index, field, value, "needs exactly one {} for the subject"))
    if problems:
        raise RequestError(problems)
    return [Fact(entry["template"].strip(), entry["subject"], entry["attribute"].strip()) for entry in entries]


def trace_row(lm: LanguageModel, fact: Fact, said: str = "") -> Row:
    """A fact as tokens: prompt, what the model itself says before the object, object."""
    text = join(fact.text, said) if said else fact.text
    start = fact.prompt.index("{}")
    (row,) = encode(lm.tokenizer, [join(text, fact.object)], [start + len(fact.subject)], [len(text)], [start])
    return row


def known_rows(
    lm: LanguageModel, facts: Sequence[Fact], limit: int | None = None, tokens: int = 8
) -> tuple[list[Row], int]:
    """The facts that the model states when it goes on greedily (CAKE, appendix E).

    A fact is known if the continuation names the object before any other capitalised word; the words before the object
    then become part of the prompt.

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
    rows: list[Row] = []
    for start in range(0, len(facts), ASKED_AT_ONCE):
        part = facts[start : start + ASKED_AT_ONCE]
        said = continuations(lm, [fact.text for fact in part], tokens)
        for asked, (fact, text) in enumerate(zip(part, said, strict=True), start + 1):
            before = said_before(text, fact.object)
            if before is not None:
                rows.append(trace_row(lm, fact, before))
            if len(rows) == limit:
                return rows, asked
    if not rows:
        remedy = "the model knows none of the facts; give some that it states by itself"
        raise RequestError([Problem(0, "facts", f"{len(facts)} facts", remedy)])
    return rows, len(facts)


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
def predicted_rows(lm: LanguageModel, batch: EditBatch, budget: int = 8192) -> list[Row]:
    """The bare prompts of a batch, the model's own most likely next token in the object's place, as in ROME's code."""
    rows, said = [variants[0] for variants in batch.rows], dict[int, int]()
    for group in plan([row.target for row in rows], budget):
        ids = pad([rows[i].ids[: rows[i].target] for i in group], lm.device)
        ends = torch.tensor([rows[i].target - 1 for i in group], device=lm.device)
        with narrow(lm, torch.arange(len(group), device=lm.device), ends):
            logits = lm.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
        said |= dict(zip(group, logits.argmax(-1).tolist(), strict=True))
    return [replace(row, ids=(*row.ids[: row.target], said[i])) for i, row in enumerate(rows)]
