"""How a long stream of edits wears out: every arm measured after so many edits.

    python benchmarks/reproduce/aging.py --data reconstructed_3000.jsonl.gz [--arms memit_seq cake ...]
    python benchmarks/reproduce/aging.py --data mend_train_1000.json --points 100 300 600 1000 --arms memit_seq cake
    python benchmarks/reproduce/aging.py --data reconstructed_3000.jsonl.gz --targets short --ability DIR
    python benchmarks/reproduce/aging.py --draw

Records with distinct subjects, in file order, in batches of 100 (``--batch-size``). One arm after another starts from
the unedited model; rows are kept in ``aging.json`` under ``--out`` as they are measured, and an arm that was
interrupted goes on where it stopped. Several processes, each with its arms, may fill one file: one for each core, or
many on one GPU. A row has the metrics of the first hundred facts and of all so far, free answers about the first
hundred, neutral text, and each record's outcomes, so that two arms can be compared record by record. ``unedited`` asks
the same of the model as it is. ``--targets`` names a shipped search for all arms, and ``--ability`` a folder of
multiple-choice tasks (``benchmarks/ability.py write``). ``--draw`` draws the rows and prints them as a table, and the
differences from ``--against`` in points, paired by record, with 95 % intervals (of the EditScore by bootstrap).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from cakeflow_ability import ChoiceItem, read_choices, score_choices
from cakeflow_streams import NormFeedback, typical_norm
from sweep import Row, interval, write_table
from torch import Tensor

from cakeflow import Editor, EditRequest, Evaluation, LocateThenEdit, read_requests
from cakeflow.callbacks import KeyDrift, PeriodicCallback, StreamHealth
from cakeflow.metrics import KINDS, record_means, success
from cakeflow.models import LanguageModel, load_model
from cakeflow.report import save_plot
from cakeflow.storage import locked, write_text

Streams = dict[str, dict[str, dict[str, Row]]]
PLAIN: dict[str, Any] = {"chat": False, "rounds": 0}
"""What the papers do: no questions in chats, no further walks."""
ONE_LAYER = {"weighter": {"class_path": "OneHot", "init_args": {"layer": "first"}}}
TEN_LAYERS: dict[str, Any] = {"layers": [*range(3, 13)], "weighter": {"class_path": "Uniform"}}
ESSENCE_4 = {"targets": {"essence": {"factor": 4.0}}}
NULL_SPACE = {
    "class_path": "NullSpace",
    "init_args": {"inner": {"class_path": "LeastSquares", "init_args": {"ridge": 1.0}}},
}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "memit_seq": ("memit_seq", PLAIN),
    "alphaedit": ("alphaedit", PLAIN),
    "cake": ("cake", PLAIN),
    "cake_official": ("cake_official", PLAIN),
    "its constants, equal weights": ("cake_official", {**PLAIN, "weighter": {"class_path": "Uniform"}}),
    "alphaedit_blue": ("alphaedit_blue", PLAIN),
    "forward_targets": ("forward_targets", PLAIN),
    "forward_targets, null space": ("forward_targets", {**PLAIN, "solver": NULL_SPACE}),
    "forward_targets, 35 steps": ("forward_targets", {**PLAIN, "targets": {"steps": 35}}),
    "first layer alone": ("memit_seq", {**PLAIN, **ONE_LAYER}),
    "alphaedit_plus": ("alphaedit_plus", PLAIN),
    "hse": ("hse", {**PLAIN, "solver": {"class_path": "PlannedHistory", "init_args": {"planned": 2000}}}),
    "rect_seq": ("rect_seq", PLAIN),
    "revive": ("revive", PLAIN),
    "sphere": ("sphere", PLAIN),
    "evoedit": ("evoedit", PLAIN),
    "betaedit": ("betaedit", PLAIN),
    "encore": ("encore", PLAIN),
    "lyaplock": ("lyaplock", PLAIN),
    "suit": ("suit", PLAIN),
    "ultraedit": ("ultraedit", PLAIN),
    "nas": ("memit_seq", PLAIN),
    "prune_seq": ("prune_seq", PLAIN),
    "memit_seq, closed loop": ("memit_seq", {**PLAIN, "rounds": 2}),
    "cake, closed loop": ("cake", {**PLAIN, "rounds": 2}),
    "memit_seq, repaired": ("memit_seq", {**PLAIN, "repairs": 1}),
    "cake, repaired": ("cake", {**PLAIN, "repairs": 1}),
    "cake, closed loop, repaired": ("cake", {**PLAIN, "rounds": 2, "repairs": 1}),
    "cake_official, repaired": ("cake_official", {**PLAIN, "repairs": 1}),
    "cake_official, closed loop, repaired": ("cake_official", {**PLAIN, "rounds": 2, "repairs": 1}),
    "cake, ten layers, repaired": ("cake", {**PLAIN, **TEN_LAYERS, "repairs": 1}),
    "cake, essence 4": ("cake", {**PLAIN, **ESSENCE_4}),
    "cake, ten layers, repaired, essence 4": ("cake", {**PLAIN, **TEN_LAYERS, **ESSENCE_4, "repairs": 1}),
}
"""Arm -> recipe, and arguments of ``LocateThenEdit`` over it; ``nas`` has one norm for all values besides."""
NORMED = 100
"""Records behind the stream on which the norm of ``nas`` is measured."""
SHOWN = {
    "first/efficacy_exact": "first 100, word for word",
    "first/efficacy": "first 100, by preference",
    "first/free": "first 100, free answers",
    "all/efficacy_exact": "all, word for word",
    "all/generalization": "all, paraphrases",
    "all/specificity": "all, specificity",
    "all/generalization_tokens": "all, paraphrases, tokens",
    "all/specificity_tokens": "all, specificity, tokens",
    "all/editscore": "all, EditScore",
    "ability/mean": "general ability",
    "health/kl": "neutral text, nats",
    "health/state": "health (0 fine, 1 wearing, 2 broken)",
}
TABLE = {
    **SHOWN,
    "growth": "largest growth of a weight",
    "target/steps": "steps of a search",
    "target/probability": "probability at its end",
    "target/arrived": "arrived",
    "written": "facts written",
}
"""Columns of the table; the figure has those of ``SHOWN``."""


class Points(PeriodicCallback):
    """Metrics of the edits so far, after some numbers of edits.

    Args:
        records: All records of the stream.
        points: Numbers of edits to measure after.
        rows: Number of edits, as text -> its row; those that are there are not measured again.
        save: Called after each row.
        tasks: Tasks of general ability, by name.
    """

    name = "points"

    def __init__(
        self,
        records: Sequence[EditRequest],
        points: Sequence[int],
        rows: dict[str, Row],
        save: Callable[[], None],
        tasks: Mapping[str, Sequence[ChoiceItem]],
    ) -> None:
        super().__init__(1)
        self.records, self.points, self.kept, self.save, self.tasks = records, points, rows, save, tasks
        self.health, self.start = StreamHealth(), time.perf_counter()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Read the neutral text."""
        self.health.on_fit_start(trainer, pl_module)

    def measure(self, module: Any) -> dict[str, float]:
        """Measure once at each of the points."""
        edits = module.journal.edits
        if edits in self.points and str(edits) not in self.kept:
            row = measured(module.lm, self.records[:edits], self.tasks)
            row |= {f"health/{name}": value for name, value in self.health.measure(module).items()}
            row |= {f"keys/{name}": value for name, value in KeyDrift().measure(module).items()}
            row["written"] = sum(len(step.facts) for step in module.journal)
            for name in ("probability", "steps", "arrived"):
                logged = [step.numbers[f"target/{name}"] for step in module.journal]
                row[f"target/{name}"] = sum(logged) / len(logged)
            row |= {"seconds": time.perf_counter() - self.start}
            self.kept[str(edits)] = row
            self.save()
        return {}


def measured(lm: LanguageModel, records: Sequence[EditRequest], tasks: Mapping[str, Sequence[ChoiceItem]]) -> Row:
    """Metrics of the first hundred records and of all, free answers about the first, tasks, and each record."""
    evaluation = Evaluation("official")
    row: Row = {f"ability/{name}": score_choices(lm, items).accuracy for name, items in tasks.items()}
    if row:
        row["ability/mean"] = sum(row.values()) / len(row)
    for name, some in {"first": records[:100], "all": records}.items():
        scores, metrics = evaluation.ask(lm, some).fields(), evaluation.metrics()
        metrics.update(**scores)
        row |= {f"{name}/{metric}": float(value) for metric, value in metrics.compute().items()}
    bare = [replace(record, probes=()) for record in records[:100]]
    free = Evaluation("clean", answer_tokens=12).ask(lm, bare).scores.answered
    row["first/free"] = float(free.float().mean())
    hits = success("probability", *(scores[name] for name in ("expected", "rival", "correct")))
    for index, kind in enumerate(KINDS):
        means = record_means(hits[scores["kind"] == index], scores["record"][scores["kind"] == index])
        if len(means) and not bool(means.isnan().any()):
            row[f"records/{kind}"] = [round(100 * value) for value in means.tolist()]
    return {name: value for name, value in row.items() if value == value}  # zsRE has no rivals to prefer


def distinct(records: Sequence[EditRequest], count: int) -> list[EditRequest]:
    """The first records whose subjects differ from all before."""
    first: dict[str, EditRequest] = {}
    for record in records:
        first.setdefault(record.subject, record)
    return list(first.values())[:count]


def run(args: argparse.Namespace, arm: str, records: Sequence[EditRequest], rows: dict[str, Row], save: Any) -> None:
    """Measure one arm at its points."""
    lm = load_model("smollm2-135m")
    tasks = read_choices(args.ability, limit=args.items) if args.ability else {}
    if torch.accelerator.is_available():
        lm.model.to(torch.accelerator.current_accelerator())
    if arm == "unedited":
        for edits in args.points:
            rows[str(edits)] = rows.get(str(edits)) or measured(lm, records[:edits], tasks)
            save()
        return
    recipe, setting = ARMS[arm][0], {**ARMS[arm][1], **({"targets": args.targets} if args.targets else {})}
    name = f"{args.data.name.split('.')[0]}-{args.batch_size}-{args.targets}-{arm.replace(' ', '-')}"
    editor = Editor.from_pretrained(
        lm.model,
        recipe,
        tokenizer=lm.tokenizer,
        config="smollm2-135m",
        evaluation=Evaluation("official"),
        trainer={"callbacks": [Points(records, args.points, rows, save, tasks)]},
        **setting,
    )
    if arm == "nas":
        editor.module.targets = one_norm(
            editor.module, distinct(read_requests(args.data), len(records) + NORMED)[-NORMED:]
        )
    editor.fit(records, args.batch_size, evaluate=False, run_dir=args.out / "runs" / name)
    shutil.rmtree(args.out / "runs" / name)


def one_norm(module: LocateThenEdit, records: Sequence[EditRequest]) -> NormFeedback:
    """The method's search with the norm that its values have for these records at the unedited model."""
    module.setup()
    norm = typical_norm(module.targets, module.lm, module.encode(records), module.layers[-1])
    print(f"norm of the values of {len(records)} records: {norm:.2f}", flush=True)
    return NormFeedback(norm, module.targets)


def main() -> None:
    """Run the arms that are missing, or draw."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path)
    options.add_argument("--points", type=int, nargs="+", default=[100, 300, 600, 1000, 2000])
    options.add_argument("--batch-size", type=int, default=100)
    options.add_argument("--arms", nargs="+", default=["unedited", *ARMS], choices=["unedited", *ARMS])
    options.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    options.add_argument("--targets", help="a shipped target search, such as short")
    options.add_argument("--ability", type=Path, help="a folder of multiple-choice tasks")
    options.add_argument("--items", type=int, default=100, help="items of each task")
    options.add_argument("--draw", action="store_true")
    options.add_argument("--against", default="memit_seq")
    args = options.parse_args()
    path = args.out / "aging.json"
    if args.draw:
        for stream, arms in read_streams(path).items():
            draw(stream, arms, args.out, args.against)
        return
    records = distinct(read_requests(args.data), max(args.points))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    search = f", {args.targets} search" if args.targets else ""
    stream = f"{args.data.name}, batches of {args.batch_size}{search}, {device}"
    for arm in args.arms:
        rows = read_streams(path).get(stream, {}).get(arm, {})
        if any(str(point) not in rows for point in args.points):
            run(args, arm, records, rows, partial(save, path, stream, arm, rows))
        for edits, row in rows.items():
            numbers = "  ".join(f"{text} {row[name]:.3f}" for name, text in SHOWN.items() if name in row)
            print(f"{arm}, {edits} edits: {numbers}", flush=True)


def read_streams(path: Path) -> Streams:
    """The rows that were measured: stream -> arm -> number of edits -> row."""
    return json.loads(path.read_text()) if path.exists() else {}


def save(path: Path, stream: str, arm: str, rows: dict[str, Row]) -> None:
    """Put the rows of one arm into the file, which other processes write as well."""
    with locked(path, wait=True):
        streams = read_streams(path)
        streams.setdefault(stream, {}).setdefault(arm, {}).update(rows)
        write_text(path, json.dumps(streams).replace("}, ", "},\n") + "\n")


def rates(row: Row) -> Tensor:
    """Efficacy, generalization and specificity of every record, records x 3."""
    return torch.tensor([row[f"records/{kind}"] for kind in KINDS], dtype=torch.float64).T / 100


def growth(row: Row) -> Row:
    """The growth of the weight that grew most, if it was measured."""
    values = [value for name, value in row.items() if name.endswith("/growth")]
    return {"growth": max(values)} if values else {}


def differences(arms: dict[str, dict[str, Row]], against: str) -> Iterator[str]:
    """Yield a line of a table for each arm and number of edits that the other arm has as well."""
    for arm, points in arms.items():
        for edits in sorted(points.keys() & arms.get(against, {}).keys(), key=int):
            if arm in (against, "unedited") or not all(points[edits].get(f"records/{kind}") for kind in KINDS):
                continue
            ours, theirs = rates(points[edits]), rates(arms[against][edits])
            draws = torch.randint(len(ours), (4000, len(ours)), generator=torch.Generator().manual_seed(0))
            scores = [3 / (1 / each[draws].mean(1)).sum(1) for each in (ours, theirs)]
            whole = [3 / (1 / each.mean(0)).sum() for each in (ours, theirs)]
            cells = [f"{100 * (whole[0] - whole[1]):+.1f} ± {196 * (scores[0] - scores[1]).std():.1f}"]
            for values in (ours - theirs).T:
                mean, half = interval(100 * values)
                cells.append(f"{mean:+.1f} ± {half:.1f}")
            yield f"| {arm} | {edits} | {' | '.join(cells)} |"


def draw(stream: str, arms: dict[str, dict[str, Row]], out: Path, against: str) -> None:
    """Write a table of all rows, and a panel per metric over the number of edits, with a line per arm."""
    name = "aging-" + re.sub(r"\W+", "-", stream.replace("jsonl.gz", "").replace("batches of ", "").lower()).strip("-")
    rows = [
        {"arm": arm, "edits": edits, **{text: f"{row[key]:.4g}" for key, text in TABLE.items() if key in row}}
        for arm, points in arms.items()
        for edits, row in ((edits, row | growth(row)) for edits, row in points.items())
    ]
    heads = [f"| against {against} | edits | EditScore | Eff | Gen | Spe |", "| --- " * 6 + "|"]
    lines = list(differences(arms, against))
    write_table(out / name, stream, rows, ["", *heads, *lines] if lines else [])
    panels = {
        key: text for key, text in SHOWN.items() if any(key in row for arm in arms.values() for row in arm.values())
    }
    colors, columns = plt.get_cmap("tab20"), -(-len(panels) // 2)
    figure, axes = plt.subplots(2, columns, figsize=(3 * columns + 3, 6), layout="constrained", squeeze=False)
    for ax, (key, text) in zip(axes.flat, panels.items(), strict=False):
        for number, (arm, points) in enumerate(arms.items()):
            curve = {int(edits): row[key] for edits, row in points.items() if key in row}
            style = {"color": colors(number % 20), "linestyle": "-" if number < 20 else "--"}
            style = {"color": "black", "linestyle": ":"} if arm == "unedited" else style
            ax.plot(list(curve), list(curve.values()), marker=".", label=arm, **style)
        ax.set(title=text, xlabel="edits")
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    handles = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, fontsize="x-small", loc="outside right center")
    save_plot(axes[0][0], out / f"{name}.png")


if __name__ == "__main__":
    main()
