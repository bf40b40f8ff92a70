"""A run folder written by hand, in the format that a fit writes; every number in it is known."""

import csv
import json
import random

import pytest
from bodies import body

from cakeflow.journal.ledger import Ledger

RELATIONS = {"P103": "The mother tongue of {} is", "P19": "{} was born in", None: "{} plays the sport of"}


def prompt(kind, text, expected, rival, scores, correct=False):
    names = (
        "kind",
        "prompt",
        "expected",
        "rival",
        "expected_logprob",
        "rival_logprob",
        "correct",
        "tokens",
        "answered",
    )
    return dict(zip(names, (kind, text, expected, rival, *scores, correct, 0.5 + correct / 2, None), strict=True))


def record(index, stage, draw, neighbors):
    relation, template = list(RELATIONS.items())[index % 3]
    subject, edited = f"Person {index}", stage == "after"
    new, true = ("Japanese", None if index % 7 == 5 else "French")

    def scores(chance):
        wins, size = draw.random() < chance, draw.uniform(0.1, 4)
        return (-0.1 - draw.random(), None if true is None else -0.1 - size - 1) if wins else (-6.0, true and -5.0)

    text = template.replace("{}", subject)
    prompts = [prompt("rewrite", text, new, true, scores(0.9 if edited else 0.2), edited)]
    prompts += [prompt("paraphrase", f"Note {n}. {text}", new, true, scores(0.8 if edited else 0.2)) for n in range(2)]
    prompts += [
        prompt("neighborhood", template.replace("{}", f"Neighbor {n} of {index}"), "French", new, scores(0.8))
        for n in range(neighbors if true else 0)
    ]
    texts = [{"prompt": f"{subject} is known for", "text": f" work that {stage} editing went on " + "and on " * 12}]
    fact = {"prompt": template, "subject": subject, "target_new": new, "target_true": true, "relation": relation}
    return {"index": index, "case_id": 1000 + index, **fact, "prompts": prompts, "generations": texts}


def write_lines(path, entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def write_log(path, batches, batch):
    """A row per batch, and before it what a callback measured; cells of other rows stay empty."""
    draw, rows, names = random.Random(0), [], ("share", "drift", "residual", "update", "relative_update")
    for step in range(batches):
        ability = {
            "ability/edits": step * batch,
            "ability/cloze/acc": 0.5 - 0.01 * step,
            "ability/cloze/acc_stderr": 0.02,
        }
        rows.append({**ability, "neutral/edits": step * batch, "neutral/perplexity": 20 + step, "step": step})
        layers = {f"layer{layer}/{name}": round(draw.uniform(0.1, 1), 6) for layer in (5, 7, 9) for name in names}
        rows.append({**layers, "epoch": 0, "step": step, "n_eff": 3.0, "target/loss": 0.25, "target/left": 0.5})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, sorted({name for row in rows for name in row}))
        writer.writeheader()
        writer.writerows(rows)


def write_journal(path, records, batch):
    steps = []
    for start in range(0, len(records), batch):
        part = records[start : start + batch]
        names = ("prompt", "subject", "target_new", "target_true", "relation")
        requests = [{name: entry[name] for name in names} for entry in part]
        losses = [0.5 / (start + place) for place in range(1, len(part) + 1)]
        targets = [{"layer": 9, "loss": loss, "probability": 0.9, "steps": 20.0} for loss in losses]
        steps.append({"batch": len(steps), "requests": requests, "targets": targets})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_ledger(path, steps)


def write_ledger(path, steps):
    path.unlink(missing_ok=True)
    ledger = Ledger(path)
    ledger.append(body("run"))
    for step in steps:
        ledger.append(body("batch", **step))


def write_run(folder, size=12, batch=4, neighbors=3, change=lambda record: record):
    """A run of ``size`` edits; ``change`` may alter every record before and after."""
    folder.mkdir(parents=True, exist_ok=True)
    for stage in ("before", "after"):
        records = [change(record(index, stage, random.Random(f"{stage}{index}"), neighbors)) for index in range(size)]
        write_lines(folder / f"{stage}.jsonl", records)
    write_journal(folder / "journal" / "ledger.jsonl", records, batch)
    write_log(folder / "metrics.csv", -(-size // batch), batch)
    (folder / "config.yaml").write_text("model:\n  base: tiny  # a comment\n  layers: [5, 7, 9]\n")
    info = {
        "model": {"source": "lab/tiny-model", "fingerprint_before": "ab12", "dtype": "torch.float32"},
        "settings": {
            "layers": [5, 7, 9],
            "weighter": "Scores(scores={5: 0.1}, tau=0.1)",
            "allocator": "Jacobian(damping=0.0)",
            "solver": "NullSpace(inner=LeastSquares(ridge=10), threshold=0.02)",
        },
        "versions": {"cakeflow": "0.1.0", "torch": "2.13.0"},
        "protocol": "clean-v1",
        "metrics": {"before": {"efficacy": 0.125, "margin": -2.5}, "after": {"efficacy": 0.875, "margin": 1.5}},
        "timings": {"evaluation": 30.0, "targets": 20.0, "keys": 4.0, "solve": 0.5},
        "peaks": {"evaluation": 3 * 2**30, "targets": 2**29, "keys": None, "solve": 2**28},
        "edits": size,
    }
    (folder / "run.json").write_text(json.dumps(info))
    return folder


@pytest.fixture
def make_run(tmp_path):
    """Writes a run folder of a name: ``make_run("a", size=3)``."""
    return lambda name="run", **settings: write_run(tmp_path / name, **settings)


@pytest.fixture
def run_folder(make_run):
    return make_run()
