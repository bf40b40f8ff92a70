"""Does it matter how the residual is spread over the layers? Every arm of `arms.yaml`, paired record by record.

    python benchmarks/reproduce/allocation.py --data reconstructed_3000.jsonl.gz --corpus valid.txt test.txt \
        --records 100 --seeds 0 1 2 --ridges 1 --json allocation.json --figure allocation.png

For every seed `--records` records are drawn and edited in batches of `--batch-size`, once per arm and per ridge
(AlphaEdit's L2), which is swept over all arms alike. Target values on the unedited model are found once for all arms.
Each arm is compared with ``uniform`` at the same ridge: mean difference over the records of all seeds in percentage
points, with its 95 % confidence interval (1.96 standard errors of the paired differences). ``margin`` is the difference
in log-probability (natural) between the wanted and the other target, which moves before a success does.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import yaml
from sweep import Row, Sweep, interval, outcomes, parser

from cakeflow import read_requests
from cakeflow.metrics import KINDS
from cakeflow.models import load_model
from cakeflow.report import save_plot

BASE = "uniform"
OUTCOMES = dict(zip(("Eff", "Gen", "Spe"), KINDS, strict=True))
Rows = dict[tuple[float, str], list[Row]]


def sweep_all(args: Any, arms: dict[str, dict[str, Any]]) -> Rows:
    """(ridge, arm) -> one row per seed; the rows of the unedited model under ridge 0."""
    lm, requests, rows = load_model("smollm2-135m"), read_requests(args.data), {}
    for seed in args.seeds:
        chosen = random.Random(seed).sample(requests, args.records)
        row = Sweep(chosen, args.corpus, args.tokens, args.json, args.batch_size or args.records, lm)
        prefix = f"{args.data.name}, {args.records} in batches of {row.batch_size}, seed {seed}"
        rows.setdefault((0.0, "unedited"), []).append(row(f"{prefix}, unedited"))
        for ridge in args.ridges:
            solver = {"class_path": "NullSpace"}
            solver["init_args"] = {"inner": {"class_path": "LeastSquares", "init_args": {"ridge": ridge}}}
            for arm, setting in arms.items():
                one = row(f"{prefix}, ridge {ridge}, {arm}", **setting, solver=solver)
                rows.setdefault((ridge, arm), []).append(one)
                print(f"{prefix}, ridge {ridge:5g}, {arm:36s} {100 * one['editscore']:.2f}", flush=True)
    return rows


def difference(rows: list[Row], base: list[Row], name: str) -> tuple[float, float]:
    """Mean paired difference and the half width of its 95 % interval."""
    return interval(outcomes(rows, name) - outcomes(base, name))


def table(rows: Rows) -> None:
    """Print means, and differences from the base."""
    head = "".join(f"{name:>7s}" for name in OUTCOMES)
    differences = "".join(f"{'d ' + name:>16s}" for name in OUTCOMES)
    margins = "".join(f"{'d margin ' + name:>16s}" for name in OUTCOMES)
    print(f"{'ridge':>6s} {'arm':36s}{'N_eff':>7s}{head}{differences}{margins}{'s / edit':>9s}")
    for (ridge, arm), seeds in rows.items():
        line = f"{ridge:6g} {arm:36s}{sum(row.get('n_eff', 0) for row in seeds) / len(seeds):7.3f}"
        line += "".join(f"{100 * float(outcomes(seeds, kind).mean()):7.1f}" for kind in OUTCOMES.values())
        if ridge and arm != BASE:
            for scale, ending in ((100, ""), (1, "_margin")):
                for kind in OUTCOMES.values():
                    mean, half = difference(seeds, rows[ridge, BASE], kind + ending)
                    line += f"{f'{scale * mean:+.2f} +- {scale * half:.2f}':>16s}"
            line += f"{sum(row['seconds_per_edit'] for row in seeds) / len(seeds):9.2f}"
        print(line)


def figure(rows: Rows, path: Path) -> None:
    """Differences from the base with their intervals, one panel per outcome, one colour per ridge."""
    arms = list(dict.fromkeys(arm for ridge, arm in rows if ridge and arm != BASE))
    ridges = sorted({ridge for ridge, _ in rows if ridge})
    _, panels = plt.subplots(1, 3, figsize=(11, 1 + 0.3 * len(arms)), sharey=True, layout="tight")
    for ax, (title, kind) in zip(panels, OUTCOMES.items(), strict=True):
        for place, ridge in enumerate(ridges):
            pairs = [difference(rows[ridge, arm], rows[ridge, BASE], kind) for arm in arms]
            heights = [index + 0.2 * (place - (len(ridges) - 1) / 2) for index in range(len(arms))]
            means, halves = zip(*pairs, strict=True)
            ax.errorbar(
                [100 * mean for mean in means], heights, xerr=[100 * half for half in halves], fmt="o", markersize=3,
                label=f"ridge {ridge:g}",
            )  # fmt: skip
        ax.axvline(0, color="grey", linewidth=0.8)
        ax.set(title=title, xlabel="points from uniform", yticks=range(len(arms)), yticklabels=arms)
    panels[0].invert_yaxis()
    if len(ridges) > 1:
        panels[-1].legend(fontsize="small")
    save_plot(panels[0], path)


def main() -> None:
    """Run what is missing, then print the table."""
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each draws its own records")
    options.add_argument("--ridges", type=float, nargs="+", default=[1.0])
    options.add_argument("--batch-size", type=int, help="edits in a batch; all by default")
    options.add_argument("--arms", nargs="+", help="only these; default: all")
    options.add_argument("--settings", type=Path, default=Path(__file__).with_name("arms.yaml"))
    options.add_argument("--figure", type=Path)
    args = options.parse_args()
    arms = yaml.safe_load(args.settings.read_text())
    rows = sweep_all(args, {arm: arms[arm] for arm in args.arms or arms})
    table(rows)
    if args.figure:
        figure(rows, args.figure)


if __name__ == "__main__":
    main()
