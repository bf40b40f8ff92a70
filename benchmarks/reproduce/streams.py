"""Streams of edits, as in figures 3, 5 and 7 of CAKE's paper: what is left of the model as they go on.

    python benchmarks/reproduce/streams.py figure3 --data COUNTERFACT --corpus valid.txt test.txt --ability DIR
    python benchmarks/reproduce/streams.py figure5 --data ZSRE --corpus valid.txt test.txt
    python benchmarks/reproduce/streams.py figure7 --data COUNTERFACT --corpus valid.txt test.txt
    python benchmarks/reproduce/streams.py health --data COUNTERFACT

``figure3``: general ability (weighted F1) every so many edits. ``figure5``: drift of each layer, and accumulated, over
100 single edits. ``figure7``: quality of all edits so far, edited one by one. ``health``, of no paper: the state of the
model (``StreamHealth``) and what it comes from. Each method starts from the unedited
model and gets the same records in the same order. At the embedded scale streams are shorter than in the paper (3,000
edits in batches of 100; 100 edits; 100 to 5,000 edits): ``--scale full`` has its numbers; ``--edits``, ``--batch-size``
and ``--every`` take any. Methods that are done are kept in ``FIGURE.json`` under ``--out``, beside the figure; one that
was interrupted goes on where it stopped, and measures the batches before again (figure 5, whose drift is only there
while a batch is edited, starts anew).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib.pyplot as plt
from cakeflow_ability import TASKS, GeneralAbility
from cakeflow_theory import ResidualDrift
from sweep import Sweep, load, write_table

from cakeflow import EditDataModule, Evaluation
from cakeflow.callbacks import PeriodicCallback, StreamHealth
from cakeflow.report import curves_of, plot_curves, save_plot
from cakeflow.storage import write_text

Points = list[dict[str, float]]


class Quality(PeriodicCallback):
    """Metrics of all records edited so far."""

    name = "quality"

    def measure(self, module: Any) -> dict[str, float]:
        """Evaluate the records of every batch so far."""
        records = [request for step in module.journal for request in step.requests]
        if not records:
            return {}
        metrics = module.evaluation.metrics()
        metrics.update(**module.evaluation.ask(module.lm, records).fields())
        return {name: float(value) for name, value in metrics.compute().items()}


class Drift(PeriodicCallback):
    """Drift of each layer in the last batch, from what ``ResidualDrift`` logs."""

    name = "layers"

    def measure(self, module: Any) -> dict[str, float]:
        """Return what the last batch logged."""
        logged = module.trainer.callback_metrics
        return {name: float(value) for name, value in logged.items() if re.fullmatch(r"layer\d+/drift", name)}


@dataclass(frozen=True)
class Stream:
    """One figure.

    Attributes:
        methods: Label -> recipe.
        scales: Edits, edits in a batch, edits between measurements; by scale.
        watch: Callbacks, the first of which keeps the figure's rows.
        draw: Draws the rows of each method.
        resumes: Whether a batch can be measured again by its weights alone.
    """

    methods: Mapping[str, str]
    scales: Mapping[str, tuple[int, int, int]]
    watch: Callable[[argparse.Namespace, int], list[L.Callback]]
    draw: Callable[[Mapping[str, Points], Path], None]
    resumes: bool = True


def draw_curves(names: Sequence[str]) -> Callable[[Mapping[str, Points], Path], None]:
    """A panel per column of the rows, over the number of edits, with a line per method."""

    def draw(points: Mapping[str, Points], path: Path) -> None:
        curves: dict[str, dict[str, Any]] = {}
        for label, rows in points.items():
            for plot, lines in curves_of(rows).items():
                for line, values in lines.items():
                    curves.setdefault(f"{plot.split()[0]}/{line}/{plot.split()[1]}", {})[label] = values
        shown = [name for name in names if name in curves]
        _, axes = plt.subplots(1, len(shown), figsize=(2.8 * len(shown), 2.8), squeeze=False, layout="tight")
        for ax, name in zip(axes[0], shown, strict=True):
            plot_curves(curves[name], ax).set_title(name.split("/")[1])
            ax.locator_params(axis="x", nbins=4)
            ax.get_legend().remove()
        axes[0][-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
        save_plot(axes[0][0], path)

    return draw


def draw_drift(points: Mapping[str, Points], path: Path) -> None:
    """Drift per layer as bars, accumulated over layers as lines; means over the stream."""
    ax = plt.figure(figsize=(5, 3), layout="tight").gca()
    other, width = ax.twinx(), 0.8 / len(points)
    for place, (label, rows) in enumerate(points.items()):
        matches = [re.fullmatch(r"layers/layer(\d+)/drift", name) for row in rows for name in row]
        columns = {int(match[1]): match[0] for match in matches if match}
        layers = sorted(columns)
        names = [columns[layer] for layer in layers]
        means = [sum(row[n] for row in rows if n in row) / sum(n in row for row in rows) for n in names]
        total = [sum(means[: i + 1]) for i in range(len(means))]
        other.bar([layer + (place - 1) * width for layer in layers], means, width, color=f"C{place}", alpha=0.5)
        ax.plot(layers, total, "o-", color=f"C{place}", label=label)
    ax.set(xlabel="layer", ylabel="cumulative drift", xticks=layers)
    other.set_ylabel("drift per layer (bars)")
    ax.legend(fontsize="small")
    save_plot(ax, path)


SEQUENTIAL = {"MEMIT": "memit", "AlphaEdit": "alphaedit", "AlphaEdit_BLUE": "alphaedit_blue", "CAKE": "cake_paper"}
RATES = ("efficacy", "generalization", "specificity")
QUALITY = [f"quality/{name}{form}/{name}{form}" for name in RATES for form in ("", "_tokens")]
F1 = [f"ability/{task}/f1" for task in TASKS]
HEALTH = [f"health/{name}/{name}" for name in ("state", "taken", "retention", "kl")]
STREAMS = {
    "figure3": Stream(
        {**SEQUENTIAL, "PRUNE": "prune", "RECT": "rect", "CAKE, exact": "cake"},
        {"embedded": (200, 50, 50), "full": (3000, 100, 500)},
        lambda args, every: [GeneralAbility(args.ability, every=every, limit=args.limit)],
        draw_curves(F1),
    ),
    "figure5": Stream(
        {"MEMIT": "memit", "AlphaEdit": "alphaedit", "CAKE": "cake_paper"},
        {"embedded": (100, 1, 1), "full": (100, 1, 1)},
        lambda args, every: [Drift(every), ResidualDrift()],
        draw_drift,
        resumes=False,
    ),
    "figure7": Stream(
        SEQUENTIAL,
        {"embedded": (100, 1, 25), "full": (5000, 1, 500)},
        lambda args, every: [Quality(every)],
        draw_curves(QUALITY),
    ),
    "health": Stream(
        {"MEMIT_seq": "memit_seq", "MEMIT": "memit"},
        {"embedded": (300, 10, 10), "full": (3000, 100, 100)},
        lambda args, every: [StreamHealth(every=every)],
        draw_curves(HEALTH),
    ),
}  # fmt: skip


def main() -> None:
    """Run the methods that are missing, then draw."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("figure", choices=STREAMS)
    options.add_argument("--scale", choices=("embedded", "full"), default="embedded")
    options.add_argument("--model", default="smollm2-135m", help="a model config: shipped name, or YAML file")
    options.add_argument("--data", required=True)
    options.add_argument("--corpus", nargs="+", help="texts for the second moments")
    options.add_argument("--tokens", type=int, default=98_304)
    options.add_argument("--ability", type=Path, help="folder of the local tasks (figure 3)")
    options.add_argument("--limit", type=int, default=100, help="items of each task")
    options.add_argument("--edits", type=int)
    options.add_argument("--batch-size", type=int)
    options.add_argument("--every", type=int, help="edits between measurements")
    options.add_argument("--seed", type=int, default=0, help="of the records and their order")
    options.add_argument("--methods", nargs="+", help="only these; default: all")
    options.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    args = options.parse_args()
    stream = STREAMS[args.figure]
    given = args.edits, args.batch_size, args.every
    edits, size, every = (own or usual for own, usual in zip(given, stream.scales[args.scale], strict=True))
    records = EditDataModule(args.data, limit=edits, shuffle_seed=args.seed, conflicts="drop").requests
    sweep = Sweep(records, args.corpus, args.tokens, None, size, load(args.model), args.model, Evaluation("official"))
    path = args.out / f"{args.figure}.json"
    run = f"{args.model}, {Path(args.data).name}, {edits} in batches of {size}, seen every {every}, seed {args.seed}"
    kept: dict[str, Points] = json.loads(path.read_text()) if path.exists() else {}
    for label in args.methods or stream.methods:
        key = f"{run}, {label}"
        if key not in kept:
            watchers = stream.watch(args, every // size)
            editor = sweep.editor(stream.methods[label], {}, *watchers, logger=stream.resumes)
            folder = args.out / "runs" / hashlib.sha256(key.encode()).hexdigest()[:12]
            editor.fit(records, size, evaluate=False, run_dir=folder if stream.resumes else None)
            editor.rollback()
            kept[key] = watchers[0].rows
            write_text(path, json.dumps(kept, indent=1))
            shutil.rmtree(folder, ignore_errors=True)
        print(f"{key}: {kept[key][-1]}", flush=True)
    shown = {label: kept[f"{run}, {label}"] for label in stream.methods if f"{run}, {label}" in kept}
    rows = [
        {"method": label, **{name: f"{v:.4g}" for name, v in row.items()}} for label in shown for row in shown[label]
    ]
    write_table(path, run, rows)
    stream.draw(shown, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
