"""Sixty answers labelled by hand, and how often each judge agrees with them.

    python benchmarks/judge.py answers --out answers.jsonl     # edit a few facts, ask, write what is to be labelled
    python benchmarks/judge.py agreement                       # compare the judges with benchmarks/judge_labels.jsonl

``answers`` edits 20 built-in facts in SmolLM2-135M by MEMIT and asks, greedily with 32 new tokens, 15 prompts of the
facts, 15 other wordings, 15 neighbors, and 15 facts as the user's turn in a chat. A line of the labels is a question
with the answer and ``right``: whether a reader takes it as saying what is expected. They were written by reading,
before any judge ran on them. ``--judge`` adds a text-generation model as a judge.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cakeflow import Editor
from cakeflow.data import builtin_facts, until_stop
from cakeflow.evaluation import Containment, ExactMatch, Judge, JudgedAnswer, ModelJudge, OnSubject, agreement
from cakeflow.forward import continuations

LABELS = Path(__file__).with_name("judge_labels.jsonl")
FACTS, EACH, TOKENS = 20, 15, 32


def main() -> None:
    """Write answers, or print the agreement of judges with the labels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    answers = commands.add_parser("answers")
    answers.add_argument("--model", default="smollm2-135m")
    answers.add_argument("--out", type=Path, required=True)
    measured = commands.add_parser("agreement")
    measured.add_argument("--judge", nargs="*", default=[], help="text-generation models")
    measured.add_argument("--labels", type=Path, default=LABELS)
    arguments = parser.parse_args()
    if arguments.command == "answers":
        write_answers(arguments.model, arguments.out)
    else:
        judges = [ExactMatch(), Containment(), OnSubject(), *map(ModelJudge, arguments.judge)]
        for judge in judges:
            print(json.dumps(compared(judge, read_labels(arguments.labels))))


def read_labels(path: Path = LABELS) -> list[dict[str, Any]]:
    """Return the labelled answers."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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


def write_answers(model: str, path: Path) -> None:
    """Edit, ask and write one line for each answer, to be labelled."""
    facts = builtin_facts()[40 : 40 + FACTS]
    editor = Editor.from_pretrained(model, method="memit")
    editor.fit(facts, evaluate=False)
    rows = [("rewrite", each.text, each.target_new) for each in facts[:EACH]]
    for kind in ("paraphrase", "neighborhood"):
        probes = [(next(p for p in each.probes if p.kind == kind), each) for each in facts[:EACH]]
        rows += [(kind, p.prompt, f.target_new if kind == "paraphrase" else str(f.target_true)) for p, f in probes]
    chats = [("chat", each.text, each.target_new) for each in facts[-EACH:]]
    lm = editor.module.lm
    texts = [*(prompt for _, prompt, _ in rows), *(lm.user_turn(prompt) for _, prompt, _ in chats)]
    written = continuations(lm, texts, TOKENS)
    with path.open("w", encoding="utf-8") as file:
        for (kind, prompt, expected), text in zip([*rows, *chats], written, strict=True):
            row = {"kind": kind, "question": prompt, "expected": expected, "answer": until_stop(text), "text": text}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
