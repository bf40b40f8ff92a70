"""Content of the page as JSON-ready data: a fact and its tokens, answers, the journal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cakeflow.core.module import EditModule
from cakeflow.data.request import EditRequest
from cakeflow.data.text import states
from cakeflow.evaluation.outcome import Outcome, is_good
from cakeflow.forward.fact_tokens import MASSIVE, FactBatch, relative_norms
from cakeflow.forward.tokens import TextBatch
from cakeflow.journal.journal import Journal
from cakeflow.journal.ledger import Entry, taken_back
from cakeflow.journal.schema import BatchBody, FactBody, FreeAnswer
from cakeflow.journal.steps import EditStep, out_of_force

IN_FORCE = "in force"
Answers = Mapping[str, FreeAnswer]
"""Prompt of a fact -> its completion before its edit and now."""


def fact_view(request: EditRequest) -> dict[str, Any]:
    """A fact: its text, where the subject stands in it, the new answer, and what will be asked beside it."""
    start = request.prompt.index("{}")
    return {
        "text": request.text,
        "subject": request.subject,
        "start": start,
        "end": request.subject_end,
        "target": request.target_new,
        "checks": [{"kind": probe.kind, "prompt": probe.prompt} for probe in request.probes],
    }


def token_views(module: EditModule, texts: TextBatch) -> list[dict[str, Any]]:
    """The tokens of one fact's bare prompt: those of the subject, the one that it is written at, and blocked ones.

    Args:
        module: The edit method, on the unedited model.
        texts: The fact, encoded by it.

    Returns:
        For each token its ``text``, whether it is ``special`` or in the ``subject``, whether the fact is ``written``
        there, and whether it is ``blocked``, because a massive activation makes its key the same in every text. Which
        token is written, and which are blocked, is known where the method chooses tokens and has its layers.
    """
    row = texts.rows[0][0]
    decode = module.lm.tokenizer.decode
    tokens = [
        {
            "text": decode([each]),
            "special": place < len(module.lm.front),
            "subject": row.start <= place <= row.subject,
            "written": False,
            "blocked": False,
        }
        for place, each in enumerate(row.ids[: row.target])
    ]
    layers, choose = getattr(module, "layers", None), getattr(module, "with_tokens", None)
    if layers and choose is not None:
        norms = relative_norms(module.lm, texts, layers[0])[0][0]
        for token, norm in zip(tokens, norms, strict=True):
            token["blocked"] = float(norm) > MASSIVE
        tokens[_written(choose(texts))]["written"] = True
    return tokens


def _written(facts: FactBatch) -> int:
    """Place of the token at which a fact is written in its bare prompt, the first row of one of its entries."""
    bare = facts.bare[0]
    rows = [rows[0] for rows in facts.texts.rows]
    return next((row.fact for row in rows if row.ids == bare.ids), bare.fact)


def outcome_view(outcome: Outcome) -> dict[str, Any]:
    """What became of an edit: the verdict, and every question with its answers before and after."""
    return {
        "verdict": outcome.verdict,
        "clean": outcome.is_clean,
        "broken": list(outcome.side_effects),
        "rows": [_answer_view(each) for each in outcome.answers],
    }


def _answer_view(answer: FreeAnswer) -> dict[str, Any]:
    names = ("topic", "form", "prompt", "expected", "before", "after", "edited")
    view = {name: getattr(answer, name) for name in names}
    return view | {"good": is_good(answer), "was_good": states(answer.before, answer.expected)}


def journal_view(journal: Journal, entries: Sequence[Entry], answers: Answers) -> list[dict[str, Any]]:
    """The facts of a journal, the latest first, with what became of each.

    Args:
        journal: The journal, whose steps are the batches that were not taken back.
        entries: Its ledger.
        answers: What the model said before, and says now.

    Returns:
        For each fact its batch and place, its texts as far as they are there, its ``state`` (``in force``,
        ``replaced`` by a later one, ``taken back``), and whether it can be taken back now.
    """
    steps = {step.number: step for step in journal.steps}
    gone = dict(zip(steps, out_of_force(journal.steps), strict=True))
    batches, facts = taken_back(entries)
    rows = []
    for entry in entries:
        if isinstance(body := entry.body, BatchBody):
            for place, name in enumerate(body.hashes):
                undoing = batches.get(body.batch) or facts.get((body.batch, name))
                row = {"batch": body.batch, "place": place, "time": entry.time, "alone": len(body.hashes) == 1}
                row |= _texts(body, steps.get(body.batch), place, answers)
                row |= _fate(body.facts[place] if body.facts else None)
                row["state"] = _state(undoing, name in gone.get(body.batch, ()))
                row["undone"] = undoing.time if undoing else ""
                row["can_undo"] = row["state"] == IN_FORCE and (row["alone"] or bool(row["text"]))
                rows.append(row)
    return rows[::-1]


def _state(undoing: Entry | None, is_gone: bool) -> str:
    return "taken back" if undoing else "replaced" if is_gone else IN_FORCE


def _texts(body: BatchBody, step: EditStep | None, place: int, answers: Answers) -> dict[str, Any]:
    """Texts of a fact: from memory, or from the ledger as far as it has them; else its hash is its name."""
    if step and step.requests:
        request = step.requests[place]
        text, subject, target = request.text, request.subject, request.target_new
    elif body.requests:
        fields = body.requests[place]
        subject, target = str(fields.get("subject", "")), str(fields.get("target_new", ""))
        text = str(fields.get("prompt", "")).replace("{}", subject)
    else:
        text = subject = target = ""
    answer = answers.get(text)
    return {
        "text": text,
        "subject": subject,
        "target": target,
        "name": body.hashes[place][:16],
        "before": answer.before if answer else None,
        "now": answer.after if answer else None,
        "good": states(answer.after or "", target) if answer and target else None,
    }


def _fate(fact: FactBody | None) -> dict[str, Any]:
    if fact is None:
        return {"taken": None, "reason": ""}
    return {"taken": fact.taken, "reason": fact.reason}
