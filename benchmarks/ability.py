"""Multiple-choice tasks from local files, and how far above chance a model does them.

    python benchmarks/ability.py write --relations LRE --sentiment sst2.jsonl --corpus brown.txt --out DIR
    python benchmarks/ability.py score DIR --limit 200

``write`` makes ``DIR/TASK.jsonl`` (``{"prompt": ..., "choices": [...], "answer": 0}`` on every line) from the files
that are named: the relations of LRE (a folder with ``linguistic/`` and ``commonsense/``), sentences with a label as in
SST-2, and any text with a sentence per line, such as the Brown corpus. Wrong choices are drawn from the other items,
with a fixed seed. ``score`` prints per task its items, chance, the score of the unedited model, and its distance from
chance in standard errors, the larger one of the score's and of a blind guess's. ``cakeflow_ability.ChoiceAbility``
scores the same files along a stream of edits.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from cakeflow_ability import read_choices, score_choices

from cakeflow.data import read_entries, read_text
from cakeflow.models import load_model
from cakeflow.storage import write_text

Item = tuple[str, str, Sequence[str]]
"""Prompt, right choice, and the texts from which wrong ones are drawn."""
RELATIONS = {
    "word_forms": ["linguistic/verb_past_tense", "linguistic/adj_comparative", "linguistic/adj_superlative"],
    "antonyms": ["linguistic/adj_antonym"],
    "categories": ["commonsense/object_superclass", "commonsense/substance_phase"],
    "work": ["commonsense/task_done_by_tool", "commonsense/task_done_by_person", "commonsense/work_location"],
}
"""Task -> relations whose items it has; the wrong choices of an item are of its own relation."""
CHOICES = 4


def related(folder: Path, relations: Iterable[str]) -> Iterator[Item]:
    """Yield the samples of some relations, each subject once."""
    for name in relations:
        relation = json.loads(read_text(folder / f"{name}.json"))
        objects = list(dict.fromkeys(sample["object"] for sample in relation["samples"]))
        samples = {sample["subject"]: sample["object"] for sample in reversed(relation["samples"])}
        for subject, right in samples.items():
            answers = {each["object"] for each in relation["samples"] if each["subject"] == subject}
            prompt = relation["prompt_templates"][0].replace("{}", subject)
            yield prompt, right, [each for each in objects if each not in answers and each != subject]


def sentiments(path: Path) -> Iterator[Item]:
    """Yield sentences with their sentiment, as many of each kind."""
    words, rows = ("negative", "positive"), read_entries(path)
    kinds = [[row["sentence"].strip() for row in rows if int(row["label"]) == label] for label in (0, 1)]
    for pair in zip(*kinds, strict=False):
        for label, sentence in enumerate(pair):
            yield f"Film review: {sentence}\nSentiment:", words[label], [words[1 - label]]


def last_words(lines: Sequence[str]) -> Iterator[Item]:
    """Yield sentences without their last word; wrong choices are last words of others."""
    pattern = re.compile(r"([A-Z][^.?!;\"`]{60,160}) ([a-z]{4,})\s?\.")
    sentences = [match.groups() for line in lines if (match := pattern.fullmatch(line.strip()))]
    words = list(dict.fromkeys(word for _, word in sentences))
    for start, word in sentences:
        yield start, word, [each for each in words if each != word]


def endings(lines: Sequence[str]) -> Iterator[Item]:
    """Yield first halves of sentences; wrong choices are second halves of others of about the same length."""
    texts = [line.split() for line in lines if re.fullmatch(r"[A-Z][^\"`;:]{80,200}", line.strip())]
    halves = [(" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])) for words in texts]
    for place, (start, end) in enumerate(halves):
        others = [each for _, each in halves[:place][-20:] + halves[place + 1 :][:20]]
        yield start, end, others


def tasks(args: argparse.Namespace) -> Iterator[tuple[str, Iterator[Item]]]:
    """Yield the name and the items of every task whose source was named."""
    if args.relations:
        for name, relations in RELATIONS.items():
            yield name, related(args.relations, relations)
    if args.sentiment:
        yield "sentiment", sentiments(args.sentiment)
    if args.corpus:
        lines = read_text(args.corpus).splitlines()
        yield "last_words", last_words(lines)
        yield "endings", endings(lines)


def entries(items: Iterable[Item], seed: int) -> list[Mapping[str, object]]:
    """Return items in a random order, each with its choices in a random order."""
    draw, rows = random.Random(seed), []
    for prompt, right, others in items:
        wrong = draw.sample(list(others), min(CHOICES - 1, len(others)))
        choices = draw.sample([right, *wrong], len(wrong) + 1)
        rows.append({"prompt": prompt, "choices": choices, "answer": choices.index(right)})
    return draw.sample(rows, len(rows))


def write(args: argparse.Namespace) -> None:
    """Write the tasks."""
    for name, items in tasks(args):
        rows = entries(items, args.seed)[: args.most]
        write_text(args.out / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        print(f"{name}: {len(rows)} items")


def score(args: argparse.Namespace) -> None:
    """Print a row for each task."""
    lm = load_model(args.model)
    print("| task | items | chance | unedited | standard errors above chance |\n|---|---|---|---|---|")
    for name, items in read_choices(args.data, limit=args.limit).items():
        each = score_choices(lm, items)
        print(
            f"| {name} | {each.items} | {each.chance:.3f} | {each.accuracy:.3f} | {each.above_chance:.1f} |", flush=True
        )


def main() -> None:
    """Write tasks, or score a model on them."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = options.add_subparsers(required=True)
    writing = commands.add_parser("write")
    writing.add_argument("--relations", type=Path)
    writing.add_argument("--sentiment", type=Path)
    writing.add_argument("--corpus", type=Path)
    writing.add_argument("--out", type=Path, required=True)
    writing.add_argument("--most", type=int, default=400, help="items of a task")
    writing.add_argument("--seed", type=int, default=0)
    writing.set_defaults(run=write)
    scoring = commands.add_parser("score")
    scoring.add_argument("data", type=Path)
    scoring.add_argument("--model", default="smollm2-135m")
    scoring.add_argument("--limit", type=int, default=200)
    scoring.set_defaults(run=score)
    args = options.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
