"""Answers labelled by hand, and how often each judge agrees with them.

    python benchmarks/judge.py answers --out answers.jsonl     # edit a few facts, ask, write what is to be labelled
    python benchmarks/judge.py answers --data counterfact.json zsre.json --first 100 --facts 8 --out answers.jsonl
    python benchmarks/judge.py agreement                       # compare the judges with benchmarks/judge_labels.jsonl
    python benchmarks/judge.py agreement --labels benchmarks/judge_labels_fresh.jsonl

``answers`` edits facts in SmolLM2-135M by MEMIT and asks, greedily with 32 new tokens, their prompts, other wordings,
neighbors, and their prompts as the user's turn in a chat: of 20 built-in facts 15 of each kind, or of some facts of
each file one of each. A line of the labels is a question with the answer and ``right``: whether a reader takes it as
saying what is expected. They were written by reading, before any judge ran on them; those of the second file after the
rules of ``Stated`` were written, and before these ran on them. ``--judge`` adds a text-generation model as a judge.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cakeflow import Editor, EditRequest
from cakeflow.data import builtin_facts, read_requests, until_stop
from cakeflow.evaluation import Containment, ExactMatch, Judge, JudgedAnswer, ModelJudge, Stated, agreement
from cakeflow.forward import continuations

LABELS = Path(__file__).with_name("judge_labels.jsonl")
FACTS, EACH, TOKENS = 20, 15, 32


def main() -> None:
    """Write answers, or print the agreement of judges with the labels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    answers = commands.add_parser("answers")
    answers.add_argument("--model", default="smollm2-135m")
    answers.add_argument("--data", nargs="*", default=[], help="files of facts")
    answers.add_argument("--first", type=int, default=0, help="place of the first fact of each file")
    answers.add_argument("--facts", type=int, default=8, help="of each file")
    answers.add_argument("--out", type=Path, required=True)
    measured = commands.add_parser("agreement")
    measured.add_argument("--judge", nargs="*", default=[], help="text-generation models")
    measured.add_argument("--labels", type=Path, default=LABELS)
    arguments = parser.parse_args()
    if arguments.command == "answers":
        write_answers(arguments.model, arguments.data, arguments.first, arguments.facts, arguments.out)
    else:
        judges = [ExactMatch(), Containment(), Stated(), *map(ModelJudge, arguments.judge)]
        for judge in judges:
            rows = read_labels(arguments.labels)
            for draw in dict.fromkeys(row.get("draw", 1) for row in rows):
                part = [row for row in rows if row.get("draw", 1) == draw]
                print(json.dumps({"draw": draw, **compared(judge, part)}))


def read_labels(path: Path = LABELS) -> list[dict[str, Any]]:
    """Return the labelled answers."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def compared(judge: Judge, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a judge's agreement with the labels, and the numbers of the answers on which it disagrees."""
    items = [
        JudgedAnswer(row["question"], row["expected"], row["answer"], row["subject"], row["kind"] == "chat")
        for row in rows
    ]
    labels = [row["right"] for row in rows]
    verdicts = judge.judge(items)
    other = [i for i, (value, label) in enumerate(zip(verdicts, labels, strict=True)) if (value >= 0.5) != label]
    return {"judge": judge.name, "agreement": agreement(verdicts, labels), "answers": len(rows), "disagrees": other}


Question = tuple[str, str, str, EditRequest]
"""Kind, prompt, expected answer, fact."""


def builtin_questions() -> Iterator[Question]:
    """Yield 15 questions of each kind about 20 built-in facts."""
    facts = builtin_facts()[40 : 40 + FACTS]
    yield from (("rewrite", each.text, each.target_new, each) for each in facts[:EACH])
    for kind in ("paraphrase", "neighborhood"):
        yield from (probe_question(each, kind) for each in facts[:EACH])
    yield from (("chat", each.text, each.target_new, each) for each in facts[-EACH:])


def file_questions(path: str, first: int, count: int) -> Iterator[Question]:
    """Yield a question of each kind about each of some facts of a file."""
    facts = read_requests(path)[first : first + count]
    yield from (("rewrite", each.text, each.target_new, each) for each in facts)
    for kind in ("paraphrase", "neighborhood"):
        yield from (probe_question(each, kind) for each in facts if any(p.kind == kind for p in each.probes))
    yield from (("chat", each.text, each.target_new, each) for each in facts)


def probe_question(fact: EditRequest, kind: str) -> Question:
    """Return the first probe of a kind as a question."""
    probe = next(each for each in fact.probes if each.kind == kind)
    expected = fact.target_new if kind == "paraphrase" else str(fact.target_true)
    return kind, probe.prompt, probe.expected or expected, fact


def write_answers(model: str, files: Sequence[str], first: int, count: int, path: Path) -> None:
    """Edit, ask and write one line for each answer, to be labelled."""
    questions = [each for file in files for each in file_questions(file, first, count)] or [*builtin_questions()]
    editor = Editor.from_pretrained(model, method="memit")
    editor.fit(list(dict.fromkeys(fact for *_, fact in questions)), evaluate=False)
    lm = editor.module.lm
    texts = [lm.user_turn(prompt) if kind == "chat" else prompt for kind, prompt, *_ in questions]
    written = continuations(lm, texts, TOKENS)
    with path.open("w", encoding="utf-8") as file:
        for (kind, prompt, expected, fact), text in zip(questions, written, strict=True):
            subject = fact.subject if fact.subject in prompt else ""
            row = {"kind": kind, "question": prompt, "subject": subject, "expected": expected}
            file.write(json.dumps({**row, "answer": until_stop(text)}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
