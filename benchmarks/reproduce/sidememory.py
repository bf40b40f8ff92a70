r"""Editing memory against editing weights: WISE's tables in small, controls beside it, at equal requests.

    python benchmarks/reproduce/sidememory.py zsre --data mend_eval_400.json --train mend_train_1000.json
    python benchmarks/reproduce/sidememory.py hallucination --data hallucination-edit.json \
        --train hallucination-train.json --points 1 10 100
    python benchmarks/reproduce/sidememory.py draw
    python benchmarks/reproduce/sidememory.py zsre --data mend_train_1000.json --train mend_train_1000.json \
        --seeds 1 --points 10 30 --arms --out DIR --try '{"layer": 22}' '{"layer": 20}'

``zsre``: streams of edits measured at 1, 10, 100 and 300 (``--points``), seed 0 over all of them, seeds 1 and 2 up to
100; each seed draws its own records. The target is ``alt``, as in WISE's code; irrelevant texts are questions and
answers of the train file. Batches end where something is measured. ``hallucination``: passages and the sentence that is
to follow; perplexity of that sentence.

A row has, over all edits so far: WISE's Rel., Gen. and Loc. (shares of tokens, teacher-forced; of unrelated questions
those that are predicted as by the unedited model), and free answers of twelve tokens, exact and by containment
(``wild``). For memories that route: the same under an oracle, the share of questions that are routed right, and the
area under the curve of distances of edited questions and paraphrases against unrelated ones. At the end of a stream:
bytes of the changes, seconds per edit, whether one edit can be undone, and whether a rollback gives the unedited
hash. Rows are kept in ``sidememory.json`` under ``--out`` as they are measured; a stream that was interrupted begins
again. ``--try`` adds arms that are arguments over ``wise``: constants are chosen by it, on records that are not
reported on.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from cakeflow_sidememory import routing_numbers
from sweep import Row, interval, write_rows, write_table

from cakeflow import Editor, EditRequest, Evaluation
from cakeflow.data import join, parse_requests
from cakeflow.errors import EditError
from cakeflow.forward import encode_texts
from cakeflow.metrics import KINDS
from cakeflow.models import prompt_lengths
from cakeflow.report import save_plot

MODEL, ASKED = "smollm2-135m", Evaluation("wild", answer_tokens=12)
PLAIN: dict[str, Any] = {"chat": False, "rounds": 0, "targets": "short"}
"""Weight edits: no questions in chats, no further walks, the shorter search."""
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "wise": ("wise", {}),
    "wise, always routed": ("wise_always", {}),
    "wise, no margin": ("wise", {"rule": {"margin": None}}),
    "wise, rehearsal": ("wise", {"rule": {"rehearsal": True}}),
    "wise_merge": ("wise_merge", {"shards": {"join_every": 20}}),
    "wise_official": ("wise_official", {}),
    "grace": ("grace", {}),
    "retrieval": ("retrieval", {}),
    "memit_seq": ("memit_seq", PLAIN),
    "alphaedit": ("alphaedit", PLAIN),
    "cake": ("cake", PLAIN),
}
"""Arm -> recipe, and arguments over it."""
SHOWN = {
    "rel": "Rel., tokens",
    "gen": "Gen., tokens",
    "loc": "Loc., tokens",
    "rel/free": "edits, free answers, exact",
    "gen/free": "paraphrases, exact",
    "rel/contained": "edits, target in the answer",
    "gen/contained": "paraphrases, target in the answer",
    "ppl": "perplexity, mean",
    "ppl/median": "perplexity, median",
    "ppl/clipped": "perplexity, clipped at 100",
}
ROUTES = {
    "routing/accuracy": "questions routed right",
    "routing/auc": "area under the curve",
    "routing/own": "edits answered by their own shard",
    "oracle/rel": "Rel. under an oracle",
    "oracle/gen": "Gen. under an oracle",
}
CURVES = {name: SHOWN[name] for name in ("rel", "gen", "rel/contained", "gen/contained", "loc")}
CURVES |= {name: ROUTES[name] for name in ("routing/accuracy", "routing/auc", "routing/own")}
COST = {
    "bytes": "MB of changes",
    "seconds": "seconds per edit",
    "undo": "one edit undone",
    "rollback": "rollback exact",
}


@dataclass(frozen=True)
class Stream:
    """Records of one seed, and what is asked beside them.

    Attributes:
        table: Name of the table.
        records: The edits, in order.
        irrelevant: Texts that are out of scope.
        points: Numbers of edits to measure after.
        seed: The draw.
    """

    table: str
    records: Sequence[EditRequest]
    irrelevant: Sequence[str]
    points: Sequence[int]
    seed: int


def zsre(args: argparse.Namespace) -> list[Stream]:
    """Streams of zsRE, a draw of records for each seed."""
    entries = [entry for entry in json.loads(args.data.read_text()) if entry["alt"].strip()]
    train = [f"{entry['loc']} {entry['loc_ans']}" for entry in json.loads(args.train.read_text())]
    streams = []
    for seed in range(args.seeds):
        draw, texts = random.Random(seed).sample(entries, len(entries)), random.Random(seed).sample(train, len(train))
        points = [point for point in args.points if point <= 100 or not seed]
        records = parse_requests(draw[: points[-1]], zsre_target="alt")
        streams.append(Stream("zsre", records, texts, points, seed))
    return streams


def hallucination(args: argparse.Namespace) -> list[Stream]:
    """Streams of WISE's passages; empty right answers of unrelated prompts are left out."""
    entries, train = (json.loads(path.read_text()) for path in (args.data, args.train))
    texts = [f"{entry['locality_prompt']} {entry['locality_ground_truth']}".strip() for entry in train]
    streams = []
    for seed in range(args.seeds):
        own = [
            {
                "prompt": entry["prompt"].strip().replace(entry["subject"], "{}", 1),
                "subject": entry["subject"],
                "target_new": entry["target_new"].strip(),
                "probes": [
                    {
                        "kind": "neighborhood",
                        "prompt": entry["locality_prompt"],
                        "expected": entry["locality_ground_truth"] or ".",
                    }
                ],
            }
            for entry in random.Random(seed).sample(entries, args.points[-1])
        ]
        streams.append(Stream("hallucination", parse_requests(own), texts, args.points, seed))
    return streams


def unrelated_predictions(module: Any, records: Sequence[EditRequest]) -> list[list[int]]:
    """The most likely token at each place of the right answers to unrelated questions, as in WISE's Loc."""
    lm, predictions = module.lm, []
    for record in records:
        for probe in (each for each in record.probes if each.kind == "neighborhood"):
            prompt = module.question(probe.prompt)
            asked, whole = encode_texts(lm.tokenizer, [prompt, join(prompt, probe.expected or "")])
            ids = torch.tensor([whole], device=lm.device)
            with torch.no_grad(), prompt_lengths(lm.model, torch.tensor([len(asked)])):
                logits = lm(input_ids=ids, use_cache=False).logits[0]
            predictions.append(logits[len(asked) - 1 : -1].argmax(-1).tolist())
    return predictions


def measured(
    module: Any, records: Sequence[EditRequest], before: Sequence[Sequence[int]]
) -> tuple[Row, list[list[int]]]:
    """Metrics of the edits so far, with each record's outcomes, and the predictions at unrelated questions."""
    module.answers = []
    scores, others = module.ask(records).scores, unrelated_predictions(module, records)
    kind = {name: scores.kind == number for number, name in enumerate(KINDS)}
    same = [[now == then for now, then in zip(*pair, strict=True)] for pair in zip(others, before, strict=False)]
    values = {
        "rel": scores.tokens[kind["rewrite"]],
        "gen": scores.tokens[kind["paraphrase"]],
        "loc": torch.tensor([sum(each) / len(each) for each in same]),
        "rel/free": scores.answered[kind["rewrite"]],
        "gen/free": scores.answered[kind["paraphrase"]],
        "rel/contained": scores.contained[kind["rewrite"]],
        "gen/contained": scores.contained[kind["paraphrase"]],
    }
    row: Row = {name: float(each.float().mean()) for name, each in values.items() if len(each)}
    row["records"] = {name: [round(float(v), 3) for v in each] for name, each in values.items()}
    perplexity = (-scores.expected[kind["rewrite"]]).exp()
    row |= {
        "ppl": float(perplexity.mean()),
        "ppl/median": float(perplexity.median()),
        "ppl/clipped": float(perplexity.clamp(max=100).mean()),
    }
    return row, others


def routing(module: Any, records: Sequence[EditRequest]) -> Row:
    """How questions were routed; empty for an arm that does not route."""
    if not hasattr(module, "routes"):
        return {}
    return {f"routing/{name}": value for name, value in routing_numbers(module.routes(records)).items()}


def under_oracle(module: Any, records: Sequence[EditRequest]) -> Row:
    """What the memory holds, apart from how it is reached: every question about an edit goes to its own shard."""
    if getattr(module, "oracle", True):
        return {}
    module.oracle = True
    try:
        row, _ = measured(module, records, ())
    finally:
        module.oracle = False
    return {f"oracle/{name}": row[name] for name in ("rel", "gen", "rel/contained", "gen/contained") if name in row}


def costs(editor: Editor, original: str, seconds: float, edits: int) -> Row:
    """What a finished stream cost; the model is unedited when this returns."""
    changes = [change for step in editor.journal for change in step.changes]
    row: Row = {"seconds": seconds / edits}
    row["bytes"] = sum(each.nbytes for applied in changes for each in applied.change.tensors().values()) / 1e6
    try:
        editor.undo(editor.journal[0].requests[0].subject)
        row["undo"] = "yes"
    except EditError as error:
        row["undo"] = f"refused: {error}"
    editor.rollback()
    row["rollback"] = "yes" if editor.module.lm.fingerprint() == original else "no"
    return row


def run(arm: str, stream: Stream, before: Sequence[Sequence[int]], save: Callable[[int, Row], None]) -> None:
    """Edit one stream, and measure it at its points."""
    recipe, setting = ARMS.get(arm) or ("wise", json.loads(arm))
    if recipe.startswith("wise"):
        setting = {**setting, "irrelevant": list(stream.irrelevant)}
    editor = Editor.from_pretrained(MODEL, recipe, evaluation=ASKED, trainer={"logger": False}, **setting)
    original, seconds, done = editor.module.lm.fingerprint(), 0.0, 0
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    for point in stream.points:
        start = time.perf_counter()
        editor.fit(list(stream.records[done:point]), evaluate=False)
        seconds, done = seconds + time.perf_counter() - start, point
        records = stream.records[:point]
        row, _ = measured(editor.module, records, before)
        row |= {"device": device} | routing(editor.module, records) | under_oracle(editor.module, records)
        save(point, row)
        if point == stream.points[-1]:
            save(point, row | costs(editor, original, seconds, point))
        print(f"{arm}, seed {stream.seed}, {point} edits: {_line(row)}", flush=True)


def _line(row: Row) -> str:
    return "  ".join(f"{name} {row[name]:.3f}" for name in (*SHOWN, *ROUTES, "seconds", "bytes") if name in row)


def unedited(records: Sequence[EditRequest]) -> tuple[Row, list[list[int]]]:
    """Metrics and predictions of the model as it is."""
    editor = Editor.from_pretrained(MODEL, "memit", evaluation=ASKED)
    return measured(editor.module, records, ())


def draw(rows: dict[str, Row], out: Path) -> None:
    """Write a table of all rows over their seeds, with 95 % intervals, and a figure of zsRE along its streams."""
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for name, row in rows.items():
        table, _, rest = name.split(", ", 2)
        arm, point = rest.rsplit(", ", 1)
        groups.setdefault((table, arm, int(point)), []).append(row)
    for table in dict.fromkeys(key[0] for key in groups):
        cells = [
            {"arm": arm, "edits": str(point), "seeds": str(len(group)), **cells_of(group)}
            for (kind, arm, point), group in sorted(groups.items(), key=lambda item: item[0][1:])
            if kind == table
        ]
        write_table(out / f"sidememory-{table}", f"{table}, SmolLM2-135M", cells)
    _, grid = plt.subplots(2, len(CURVES) // 2, figsize=(2 * len(CURVES), 7.2), layout="tight")
    axes = grid.flatten()
    for ax, (key, text) in zip(axes, CURVES.items(), strict=True):
        for arm in dict.fromkeys(arm for kind, arm, _ in groups if kind == "zsre"):
            points = sorted(point for kind, other, point in groups if (kind, other) == ("zsre", arm))
            curve = {point: pooled(groups["zsre", arm, point], key) for point in points}
            known = {point: values for point, values in curve.items() if len(values)}
            ax.plot(list(known), [float(values.mean()) for values in known.values()], ".-", label=arm)
        ax.set(title=text, xlabel="edits", xscale="log")
    axes[0].legend(fontsize="x-small")
    save_plot(axes[0], out.parent / "figures" / "sidememory.png")


def pooled(group: Sequence[Row], key: str) -> torch.Tensor:
    """The outcomes of all records of all seeds, or one number of each seed."""
    records = [value for row in group for value in row["records"].get(key, ())]
    return torch.tensor(records or [row[key] for row in group if key in row], dtype=torch.float64)


def cells_of(group: Sequence[Row]) -> dict[str, str]:
    """The cells of one arm and number of edits: means with intervals over records, or over seeds."""
    cells = {}
    for key, text in {**SHOWN, **ROUTES}.items():
        values = pooled(group, key)
        mean, half = interval(values) if len(values) > 1 else (float(values.mean()) if len(values) else math.nan, 0.0)
        scale = 1 if key.startswith("ppl") else 100
        cells[text] = (
            "" if math.isnan(mean) else f"{scale * mean:.1f} ± {scale * half:.1f}" if half else f"{scale * mean:.1f}"
        )
    last = next((row for row in group if "seconds" in row), {})
    return cells | {text: f"{last[key]:.3g}" if isinstance(last[key], float) else last[key].split(":")[0]
                    for key, text in COST.items() if key in last}  # fmt: skip


def run_arms(stream: Stream, arms: Sequence[str], rows: dict[str, Row], keep: Callable[[str, Row], None]) -> None:
    """Run the arms of one stream whose rows are missing; the unedited model comes first."""
    before: list[list[int]] | None = None
    for arm in arms:
        name = f"{stream.table}, seed {stream.seed}, {arm}"
        if all(f"{name}, {point}" in rows for point in stream.points):
            continue
        if before is None:
            for point in stream.points:
                row, before = unedited(stream.records[:point])
                keep(f"{stream.table}, seed {stream.seed}, unedited, {point}", row)
        run(arm, stream, before or [], lambda point, row, name=name: keep(f"{name}, {point}", row))


def main() -> None:
    """Run the rows that are missing, or draw."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("table", choices=["zsre", "hallucination", "draw"])
    options.add_argument("--data", type=Path)
    options.add_argument("--train", type=Path)
    options.add_argument("--arms", nargs="*", default=[*ARMS], choices=[*ARMS])
    options.add_argument("--try", dest="tried", nargs="*", default=[], help="arguments over wise as JSON: arms to tune")
    options.add_argument("--points", type=int, nargs="+", default=[1, 10, 100, 300])
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    args = options.parse_args()
    path = args.out / "sidememory.json"
    rows: dict[str, Row] = json.loads(path.read_text()) if path.exists() else {}
    if args.table == "draw":
        draw(rows, args.out)
        return

    def keep(name: str, row: Row) -> None:
        rows[name] = row
        write_rows(path, rows)

    for stream in (zsre if args.table == "zsre" else hallucination)(args):
        run_arms(stream, [*args.arms, *args.tried], rows, keep)


if __name__ == "__main__":
    main()
