"""Questions with several right answers: four tasks on PEAK's records, for edits that are composed and for any recipe.

    python benchmarks/reproduce/composition.py --peak PEAK_counter.json --questions 100 --arms a3e a3e_oracle cake wise

Each question gets some answers that the model would not begin with (``--answers``). MAC asks for all of them at once,
IMAC for each; MQC asks two questions in one prompt, IMQC each by itself (``cakeflow_sidememory.tasks``). Arms are in
``composition.yaml``; any other name is a recipe. Every answer is a request of its own, and all are edited in one batch
(``--batch-size``). Answers are greedy; solved examples of questions that are not edited stand before the prompts of MAC
and MQC (``--shots``). Measured are SR-S, SR-1, GSR and LSR, as means over prompts with 95 % intervals; of edits that
are retrieved also which part of the needed ones is, and which part of the retrieved is needed. Under an oracle an
unrelated prompt needs none, so that LSR is 1.

Rows go to ``--json`` as they are done, and those it holds are not run again; a table of all is printed and written
beside it. A row is known by arm, task and the numbers above.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import yaml
from cakeflow_sidememory import FactorMemory
from cakeflow_sidememory.answers import gives_in_place, same_words, share_given
from cakeflow_sidememory.decoding import answer, comma_tokens
from cakeflow_sidememory.tasks import (
    PAIR,
    Question,
    Task,
    TaskItem,
    TaskSet,
    build_task,
    choose_answers,
    read_questions,
)
from sweep import write_table

from cakeflow import Editor
from cakeflow.core import shipped
from cakeflow.forward import continuations, encode_texts
from cakeflow.models import LanguageModel, load_model
from cakeflow.report import Interval
from cakeflow.storage import write_text

METRICS = ("SR-S", "SR-1", "GSR", "LSR", "recall", "precision")
TASKS: tuple[Task, ...] = get_args(Task)


@dataclass(frozen=True)
class Arm:
    """One way to edit and ask.

    Attributes:
        method: The recipe.
        arguments: Arguments that differ from the recipe's.
        oracle: Whether each prompt is told which edits it needs; of composed edits only.
        commas: Whether answers are written by the rule of A3E's driver.
    """

    method: str
    arguments: dict[str, Any] = field(default_factory=dict)
    oracle: bool = False
    commas: bool = False

    @property
    def edit(self) -> str:
        """What decides the edited model."""
        return json.dumps([self.method, self.arguments], sort_keys=True)


def read_arms(names: Sequence[str]) -> dict[str, Arm]:
    """Arms by their names; a name that the file lacks is a recipe.

    Raises:
        SystemExit: If a name is neither.
    """
    data = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
    if unknown := [name for name in names if name not in {*data, *shipped("method")}]:
        raise SystemExit(f"no arm or recipe {', '.join(unknown)}; arms: {', '.join(data)}")
    return {name: Arm(**data.get(name, {"method": name})) for name in names}


# ---- the tasks ----


def choose(lm: LanguageModel, args: argparse.Namespace) -> tuple[list[Question], list[Question]]:
    """The edited questions, and those of the solved examples; each with so many answers, from the file's beginning."""
    everything = read_questions(args.peak)
    chosen: list[Question] = []
    size = args.questions + args.shots * 2
    for start in range(0, len(everything), 2 * size):  # part by part: the model is asked about every answer
        chosen += choose_answers(lm, everything[start : start + 2 * size], args.answers)
        if len(chosen) >= size:
            break
    if len(chosen) < size:
        raise SystemExit(f"{args.peak} has {len(chosen)} questions with {args.answers} answers to edit, not {size}")
    kept = [replace(each, unrelated=each.unrelated[: args.unrelated]) for each in chosen]
    return kept[: args.questions], kept[args.questions : size]


def examples_of(task: Task, questions: Sequence[Question]) -> str:
    """Solved examples before the prompts of a task, one a line."""
    if task == "MQC":
        pairs = zip(questions[::2], questions[1::2], strict=True)
        lines = [f"{PAIR.format(a.text, b.text)} {a.answers[0]}, {b.answers[0]}" for a, b in pairs]
    else:
        lines = [f"{each.text} {', '.join(each.answers)}" for each in questions[::2]]
    return "".join(f"{line}\n" for line in lines)


# ---- one arm ----


def edited(arm: Arm, task: TaskSet, args: argparse.Namespace) -> tuple[Editor, float]:
    """An editor that has edited all requests of a task, and the seconds that it took."""
    trainer = {"logger": False, "enable_progress_bar": False}
    editor = Editor.from_pretrained(args.model, arm.method, trainer=trainer, **arm.arguments)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # answers of one question look like contradictions
        editor.fit(list(task.edits), args.batch_size, evaluate=False)
    return editor, time.perf_counter() - start


def written(lm: LanguageModel, prompts: Sequence[str], tokens: int, *, commas: bool) -> list[str]:
    """What a model writes behind prompts, greedily or by the rule of A3E's driver."""
    if not commas:
        return continuations(lm, prompts, tokens)
    signs, rows = comma_tokens(lm), encode_texts(lm.tokenizer, prompts)
    answers = [answer(lm, row, tokens, signs)[0] for row in rows]
    return [str(lm.tokenizer.decode(each, skip_special_tokens=True)) for each in answers]


class Asker:
    """Asks an edited model in an arm's way.

    Args:
        arm: The arm.
        module: Its edit method, with the edited model.
        tokens: Tokens of an answer.
    """

    def __init__(self, arm: Arm, module: Any, tokens: int) -> None:
        if arm.oracle and not isinstance(module, FactorMemory):
            raise SystemExit(f"{arm.method}: only composed edits can be named by an oracle")
        self.lm, self.arm, self.tokens, self.question = module.lm, arm, tokens, module.question
        self.memory = module.memory() if isinstance(module, FactorMemory) else None

    def __call__(self, prompts: Sequence[str], edits: Sequence[int]) -> list[str]:
        """Answers to prompts that need some edits."""
        named = self.memory.oracle(edits) if self.memory is not None and self.arm.oracle else nullcontext()
        with named:
            return written(self.lm, [*map(self.question, prompts)], self.tokens, commas=self.arm.commas)

    def retrieved(self, item: TaskItem) -> tuple[float, float]:
        """Part of the needed edits that the prompt retrieves, and part of the retrieved that is needed."""
        if self.memory is None or self.arm.oracle:
            return np.nan, np.nan
        (row,) = encode_texts(self.lm.tokenizer, [item.prompt])
        with torch.no_grad():
            self.lm(input_ids=torch.tensor([row], device=self.lm.device), use_cache=False)
        chosen, needed = set(self.memory.decision[0].nonzero()[:, 0].tolist()), set(item.edits)
        return len(chosen & needed) / len(needed), len(chosen & needed) / len(chosen) if chosen else np.nan

    def judge(self, item: TaskItem, before: dict[str, str]) -> tuple[dict[str, float], str]:
        """Each metric of one prompt, and what was answered."""
        text, *others = self([item.prompt, *item.paraphrases], item.edits)
        after = self(item.unrelated, ()) if item.unrelated else []
        recall, precision = self.retrieved(item)
        paraphrases = [gives_in_place(each, item.expected) for each in others]
        stable = [same_words(before[prompt], each) for prompt, each in zip(item.unrelated, after, strict=True)]
        numbers = {
            "SR-S": float(gives_in_place(text, item.expected)),
            "SR-1": share_given(text, item.expected),
            "GSR": float(np.mean(paraphrases)) if paraphrases else np.nan,
            "LSR": float(np.mean(stable)) if stable else np.nan,
            "recall": recall,
            "precision": precision,
        }
        return numbers, text


def run(asker: Asker, task: TaskSet, before: dict[str, str]) -> dict[str, Any]:
    """A row: means and intervals over prompts, each number by prompt, and some answers.

    The independent tasks ask a prompt once for each of its answers; these count as one.
    """
    records = [(item.prompt, *asker.judge(item, before)) for item in task.items]
    groups = [list(group) for _, group in groupby(records, key=lambda record: record[0])]
    row: dict[str, Any] = {"prompts": len(groups), "edits": len(task.edits)}
    for name in METRICS:
        means = np.array([np.mean([numbers[name] for _, numbers, _ in group]) for group in groups])
        if not np.isnan(means).all():
            interval = Interval.of(means)
            row[name] = [round(value, 4) for value in (interval.mean, interval.low, interval.high)]
            row.setdefault("values", {})[name] = [None if value != value else round(float(value), 4) for value in means]
    row["answers"] = [[prompt.rpartition("\n")[2], text] for prompt, _, text in records[:5]]
    return row


# ---- the file of rows ----


def show(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Print and write the table of all rows, in percent."""
    lines = []
    for name, row in rows.items():
        numbers = {key: [100 * value for value in row[key]] for key in METRICS if key in row}
        cells = {key: f"{mean:.1f} [{low:.1f}, {high:.1f}]" for key, (mean, low, high) in numbers.items()}
        seconds = {"seconds per edit": str(row["seconds"])}
        lines.append({"arm: task": name, "prompts": str(row["prompts"]), **cells, **seconds})
    write_table(path, "Four tasks on PEAK, in % with 95 % intervals over prompts", lines)


def missing(
    arms: dict[str, Arm], tasks: dict[Task, TaskSet], rows: dict[str, Any], label: str
) -> Iterator[tuple[list[str], list[Task]]]:
    """Groups of arms and of tasks that need one edited model, as far as rows are missing."""
    for edit in dict.fromkeys(arm.edit for arm in arms.values()):
        names = [name for name, arm in arms.items() if arm.edit == edit]
        for pair in (TASKS[:2], TASKS[2:]):
            left = [task for task in pair if task in tasks and any(f"{n}: {task}, {label}" not in rows for n in names)]
            if left:
                yield names, left


def main() -> None:
    """Edit and ask, arm by arm."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--peak", type=Path, required=True, help="PEAK_counter.json or PEAK_time.json")
    options.add_argument("--arms", nargs="+", default=["a3e", "a3e_oracle"])
    options.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    options.add_argument("--questions", type=int, default=100)
    options.add_argument("--answers", type=int, default=2, help="edited answers of each question")
    options.add_argument("--unrelated", type=int, default=3, help="most unrelated prompts of each question")
    options.add_argument("--shots", type=int, default=4, help="solved examples before the prompts of MAC and MQC")
    options.add_argument("--tokens", type=int, default=15, help="tokens of an answer (official: 15)")
    options.add_argument("--batch-size", type=int, help="edits in a batch; all by default")
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "composition.json")
    args = options.parse_args()
    arms = read_arms(args.arms)
    rows: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {}
    lm = load_model(args.model)
    questions, solved = choose(lm, args)
    tasks = {task: build_task(task, questions, examples_of(task, solved)) for task in args.tasks}
    unrelated = sorted({prompt for task in tasks.values() for item in task.items for prompt in item.unrelated})
    before = {
        commas: dict(zip(unrelated, written(lm, unrelated, args.tokens, commas=commas), strict=True))
        for commas in {arm.commas for arm in arms.values()}
    }
    label = f"{args.model}, {args.peak.stem}, {args.questions} questions of {args.answers}, {args.shots} shots"
    for names, left in missing(arms, tasks, rows, label):
        editor, seconds = edited(arms[names[0]], tasks[left[0]], args)
        for name in names:
            asker = Asker(arms[name], editor.module, args.tokens)
            for task in left:
                row = run(asker, tasks[task], before[arms[name].commas])
                row["seconds"] = round(seconds / row["edits"], 2)
                rows[f"{name}: {task}, {label}"] = row
                write_text(args.json, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    show(rows, args.json)


if __name__ == "__main__":
    main()
