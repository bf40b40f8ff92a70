"""Questions with several right answers, and the four tasks that edits have to solve together (A3E, on PEAK's records).

A3E's own files are not public. They are rebuilt here from PEAK (Ma et al. 2024): a question is a record's prompt with
its subject, and its edits are answers of ``postive_list`` (the file's spelling) that the model would not begin with.

| task | prompt | edits in force | answer |
| --- | --- | --- | --- |
| MAC | a question | all of the question | all of its answers, in any order |
| IMAC | a question, once for each of its edits | that edit | that answer |
| MQC | two questions in one prompt | one of each question | both answers, in the order of the questions |
| IMQC | each of these questions by itself | that edit | that answer |

The two independent tasks are the same edits without composition; the paper's text of them is not public either, so
this reading is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import regex

from cakeflow.data import EditRequest, read_entries
from cakeflow.errors import ConfigError, Fault, RequestError, has_surrogate, require_choice, require_count
from cakeflow.forward import Row, encode_prompts, predict
from cakeflow.models import LanguageModel

Task = Literal["MAC", "IMAC", "MQC", "IMQC"]
PAIR = 'The answers of the questions "{}", "{}" are'
"""Prompt of two questions."""
NO_TEXT = "must be a valid text that is not blank"


@dataclass(frozen=True)
class Question:
    """A question with several right answers.

    Attributes:
        prompt: Text with one ``{}`` for the subject.
        subject: The subject.
        answers: Right answers; in a task, those that are edited.
        paraphrases: Other ways to ask it.
        unrelated: Prompts about other subjects.
        case_id: Id of the record.
        relation: Id of its relation.
    """

    prompt: str
    subject: str
    answers: tuple[str, ...]
    paraphrases: tuple[str, ...] = ()
    unrelated: tuple[str, ...] = ()
    case_id: int | str | None = None
    relation: str = ""

    @property
    def text(self) -> str:
        """The prompt with its subject."""
        return self.prompt.replace("{}", self.subject)

    def requests(self) -> list[EditRequest]:
        """Return one edit for each answer.

        Each has a relation of its own, since several answers of one question do not contradict each other.
        """
        relation = self.relation or self.prompt
        return [
            EditRequest(self.prompt, self.subject, each, relation=f"{relation}: {each}", case_id=self.case_id)
            for each in self.answers
        ]


@dataclass(frozen=True)
class TaskItem:
    """One prompt of a task.

    Attributes:
        prompt: The prompt.
        edits: Indices of the edits that it needs: an oracle's retrieval.
        expected: Its answers, as ``SequenceSuccess`` takes them.
        paraphrases: Other ways to ask it, with the same answers.
        unrelated: Prompts whose answers should stay as they are.
    """

    prompt: str
    edits: tuple[int, ...]
    expected: tuple[tuple[str, ...], ...]
    paraphrases: tuple[str, ...] = ()
    unrelated: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskSet:
    """A task: the edits, and the prompts that ask for them.

    Attributes:
        task: Its name.
        edits: All edits, in order.
        items: The prompts.
    """

    task: Task
    edits: tuple[EditRequest, ...]
    items: tuple[TaskItem, ...]


def read_questions(path: Path | str) -> list[Question]:
    """Read PEAK's records, ``PEAK_counter.json`` or ``PEAK_time.json``, as questions with all right answers.

    Raises:
        ConfigError: If there is no such file.
        RequestError: If the file is no list of records, is empty, or has faulty ones; all are named.
    """
    entries = read_entries(Path(path), raw=True)
    if not entries:
        raise RequestError([Fault(0, "file", str(path), "has no record; give one of PEAK's files")])
    if faults := [fault for i, entry in enumerate(entries) for fault in _faults(i, entry)]:
        raise RequestError(faults)
    return [_question(entry) for entry in entries]


def _faults(index: int, entry: Any) -> Iterator[Fault]:
    """Yield all faults of a record."""
    rewrite = entry.get("requested_rewrite") if isinstance(entry, dict) else None
    if not isinstance(rewrite, dict):
        yield Fault(index, "requested_rewrite", rewrite, "must be an object with prompt and subject")
        return
    for name in ("prompt", "subject"):
        if not _is_text(rewrite.get(name)):
            yield Fault(index, f"requested_rewrite.{name}", rewrite.get(name), NO_TEXT)
    if isinstance(rewrite.get("prompt"), str) and rewrite["prompt"].count("{}") != 1:
        yield Fault(index, "requested_rewrite.prompt", rewrite["prompt"], "needs exactly one {} for the subject")
    yield from _list_faults(index, entry)
    if not isinstance(entry.get("case_id"), int | str | None) or not isinstance(rewrite.get("relation_id"), str | None):
        names = entry.get("case_id"), rewrite.get("relation_id")
        yield Fault(index, "case_id, relation_id", names, "must be a number or a text, and a text")


def _list_faults(index: int, entry: dict[str, Any]) -> Iterator[Fault]:
    for name, least in (("postive_list", 1), ("para_add_prompts", 0)):
        texts = entry.get(name, [])
        if not (isinstance(texts, list) and len(texts) >= least and all(map(_is_text, texts))):
            yield Fault(index, name, texts, f"must be a list of at least {least} valid texts, none blank")
    pairs = entry.get("neighborhood_prompts", [])
    if not (isinstance(pairs, list) and all(map(_is_pair, pairs))):
        yield Fault(index, "neighborhood_prompts", pairs, "must be a list of [prompt, answer]")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and not has_surrogate(value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_text, value))


def _question(entry: dict[str, Any]) -> Question:
    rewrite = entry["requested_rewrite"]
    return Question(
        rewrite["prompt"],
        rewrite["subject"].strip(),
        tuple(dict.fromkeys(entry["postive_list"])),
        tuple(entry.get("para_add_prompts", ())),
        tuple(pair[0] for pair in entry.get("neighborhood_prompts", ())),
        entry.get("case_id"),
        str(rewrite.get("relation_id", "")),
    )


def solid(answer: str) -> str:
    """Return an answer without its spaces, commas and brackets, as A3E's code trains it.

    Example:
        >>> solid("Georgia (country)")
        'Georgiacountry'
    """
    return str(regex.sub(r"[\s,()\[\]]", "", answer))


def choose_answers(
    lm: LanguageModel, questions: Sequence[Question], count: int = 2, is_solid: bool = False
) -> list[Question]:
    """Keep of each question the first answers that the model would not begin with: what there is to edit.

    Args:
        lm: The unedited model.
        questions: Questions with all right answers.
        count: Number of answers to keep, 1 to 4 in the paper; questions that have fewer are left out.
        is_solid: Whether answers are written without spaces, commas and brackets, as in the official code.

    Returns:
        The questions that are left, each with ``count`` answers.

    Raises:
        ConfigError: If ``count`` is no whole number from 1 on, or no question has as many.
    """
    require_count("count", count, 1)
    if not questions:
        raise ConfigError("there are no questions to choose answers of; give those of a file (read_questions)")
    written = [replace(each, answers=_written(each.answers, is_solid)) for each in questions]
    prompts, answers = zip(*((each.text, answer) for each in written for answer in each.answers), strict=True)
    rows = encode_prompts(lm.tokenizer, prompts, answers)
    is_likeliest = _begins_likeliest(lm, rows)
    chosen, at = [], 0
    for question in written:
        pairs = zip(question.answers, is_likeliest[at : at + len(question.answers)], strict=True)
        left = tuple(answer for answer, likeliest in pairs if likeliest is False)
        at += len(question.answers)
        if len(left) >= count:
            chosen.append(replace(question, answers=left[:count]))
    if not chosen:
        raise ConfigError(f"none of {len(questions)} questions has {count} answers to edit; lower count")
    return chosen


def _begins_likeliest(lm: LanguageModel, rows: Sequence[Row]) -> list[bool | None]:
    """Return for each row whether the model's likeliest token begins its answer; None for an answer without a token."""
    whole = [i for i, row in enumerate(rows) if row.target < len(row.ids)]
    contexts, labels = [rows[i].ids[: rows[i].target] for i in whole], [rows[i].ids[rows[i].target] for i in whole]
    hits = dict(zip(whole, predict(lm, contexts, labels)[1].tolist(), strict=True))
    return [hits.get(i) for i in range(len(rows))]


def _written(answers: Sequence[str], is_solid: bool) -> tuple[str, ...]:
    return tuple(dict.fromkeys(map(solid, answers))) if is_solid else tuple(answers)


def build_task(task: Task, questions: Sequence[Question], examples: str = "") -> TaskSet:
    """Build one of the four tasks from questions, whose answers are all edited.

    Args:
        task: Its name.
        questions: Questions with the answers that are edited (``choose_answers``).
        examples: Solved examples before the prompts of MAC and MQC (four in the official code), never before edits.

    Raises:
        ConfigError: If ``task`` names none, there are no questions, or one has fewer answers than the task needs; for
            two questions in one prompt, if there is only one.
    """
    require_choice("task", task, Task)
    least = 2 if task in ("MAC", "IMAC") else 1
    short = [i for i, each in enumerate(questions) if len(each.answers) < least]
    if short or len(questions) < (1 if least == 2 else 2):
        raise ConfigError(
            f"{task} needs {'questions' if least == 2 else 'two questions'} with at least {least} answer(s) each; of "
            f"{len(questions)} questions {len(short)} have fewer: choose others (choose_answers)"
        )
    edited = questions if least == 2 else [replace(each, answers=each.answers[:1]) for each in questions]
    starts = [sum(len(each.answers) for each in edited[:i]) for i in range(len(edited))]
    items = _BUILDERS[task](edited, starts)
    if task in ("MAC", "MQC"):
        items = [_with_examples(item, examples) for item in items]
    return TaskSet(task, tuple(edit for each in edited for edit in each.requests()), tuple(items))


def _with_examples(item: TaskItem, examples: str) -> TaskItem:
    return replace(item, prompt=examples + item.prompt, paraphrases=tuple(examples + each for each in item.paraphrases))


def _together(questions: Sequence[Question], starts: Sequence[int]) -> list[TaskItem]:
    """MAC: one prompt per question, with all of its answers."""
    return [
        TaskItem(q.text, tuple(range(start, start + len(q.answers))), (q.answers,), q.paraphrases, q.unrelated)
        for q, start in zip(questions, starts, strict=True)
    ]


def _alone(questions: Sequence[Question], starts: Sequence[int]) -> list[TaskItem]:
    """IMAC and IMQC: one prompt per edit."""
    return [
        TaskItem(q.text, (start + i,), ((answer,),), q.paraphrases, q.unrelated)
        for q, start in zip(questions, starts, strict=True)
        for i, answer in enumerate(q.answers)
    ]


def _pairs(questions: Sequence[Question], starts: Sequence[int]) -> list[TaskItem]:
    """MQC: one prompt for each two questions; of an odd number the last one stays alone, and is not asked."""
    items = []
    for i in range(0, len(questions) - 1, 2):
        first, second = questions[i : i + 2]
        texts = zip((first.text, *first.paraphrases), (second.text, *second.paraphrases), strict=False)
        prompt, *paraphrases = [PAIR.format(*pair) for pair in texts]
        expected = (first.answers, second.answers)
        unrelated = first.unrelated + second.unrelated
        items.append(TaskItem(prompt, (starts[i], starts[i + 1]), expected, tuple(paraphrases), unrelated))
    return items


_BUILDERS = {"MAC": _together, "IMAC": _alone, "MQC": _pairs, "IMQC": _alone}
