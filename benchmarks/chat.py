"""What a batch of edits does to chats: facts learned, and familiar answers that stay, at several seeds and options.

    python benchmarks/chat.py --data facts.json --seeds 0 1 2 --options '{}' '{"chat": false}' --out chat.jsonl

An arm is a seed with the options of an editor; its row is written when it ends, and a second call goes on with the
arms that are missing. The seed is that of the sampled contexts, and of what is sampled of the corpus. ``asked`` are the
facts that it states after a system prompt, after an earlier exchange and after 50 and 200 tokens of other text;
``lost`` are the familiar chat questions that it answers in another way, with the answers before and after; ``random``
are those of them that it still answers after a random change of the same size in place of the edit.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch

from cakeflow import Editor
from cakeflow.callbacks import NeutralText, OutcomeCheck
from cakeflow.data import builtin_facts, read_requests
from cakeflow.evaluation import states_in_contexts
from cakeflow.metrics import AnswerRate

FAMILIAR, NOISES = 64, 3


def main() -> None:
    """Run the arms that the file lacks, and print all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True, help="facts, or builtin")
    parser.add_argument("--first", type=int, help="number of facts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--options", type=json.loads, nargs="+", default=[{}], help="of Editor.from_pretrained, as JSON"
    )
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    for options in arguments.options:
        for seed in arguments.seeds:
            name = {"data": arguments.data, "first": arguments.first, "seed": seed, "options": options}
            if not any(row["arm"] == name for row in rows):
                requests = read_requests(arguments.data)[: arguments.first]
                row = {"arm": name, **arm(arguments.model, requests, seed, options)}
                rows.append(row)
                with arguments.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    for row in rows:
        print(json.dumps(row))


def arm(model: str, requests: list[Any], seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Edit the facts and return what became of them and of the familiar answers, as counts, with the metrics."""
    start = time.perf_counter()
    options = {"seed": seed, **options, "statistics": {"seed": seed, **options.get("statistics", {})}}
    callbacks = [OutcomeCheck(familiar=FAMILIAR), NeutralText(every=None)]
    editor = Editor.from_pretrained(model, trainer={"callbacks": callbacks, "logger": False}, **options)
    result = editor.fit(requests)
    assert result.outcome is not None
    counts: dict[str, Any] = {}
    rows = result.outcome.rows()
    familiar = [row for row in rows if (row["topic"], row["form"]) == ("familiar", "chat")]
    counts["lost"] = {row["prompt"]: [row["before"], row["after"]] for row in familiar if not row["good"]}
    for topic, form in (("fact", "completion"), ("fact", "chat"), ("familiar", "completion"), ("familiar", "chat")):
        good = [row["good"] for row in rows if (row["topic"], row["form"]) == (topic, form)]
        counts[f"{topic}, {form}"] = [sum(good), len(good)]
    metrics = {name: round(value, 4) for name, value in result.after.items()}
    shares = states_in_contexts(editor.module.lm, requests, text=other_text())
    asked = {name: round(share * len(requests)) for name, share in shares.items()}
    seconds, divergence = round(time.perf_counter() - start), round(result.logged["neutral/kl"], 4)
    counts |= {"asked": asked, "metrics": metrics, "neutral/kl": divergence, "seconds": seconds}
    return {**counts, "random": [familiar_after_noise(editor, familiar, each) for each in range(NOISES)]}


@torch.no_grad()
def familiar_after_noise(editor: Editor, familiar: list[dict[str, Any]], seed: int) -> int:
    """Return how many familiar chat answers stay if each matrix changes by noise of the edit's Frobenius norm."""
    weights = dict(editor.module.lm.model.named_parameters())
    edited = {name: weight.clone() for name, weight in weights.items()}
    generator = torch.Generator().manual_seed(seed)
    with editor.journal.reverted():
        for name, weight in weights.items():
            change = edited[name] - weight
            if change.any():
                noise = torch.randn(weight.shape, generator=generator).to(weight)
                weight.add_(noise * change.norm() / noise.norm())
        answers = editor.ask([row["prompt"] for row in familiar], chat=True)
    kept = AnswerRate()
    kept.update(answers, [row["expected"] for row in familiar])
    return round(float(kept.compute()) * len(familiar))


def other_text() -> str:
    """Return the references of some built-in facts, behind which the facts are asked."""
    references = sorted({fact.reference for fact in builtin_facts() if fact.reference})
    return " ".join(random.Random(0).sample(references, 8))


if __name__ == "__main__":
    main()
