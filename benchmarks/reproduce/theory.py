"""CAKE's theory, measured on one batch of edits (appendices A.5 and B.5, figure 5, table 5).

    python benchmarks/reproduce/theory.py --data verbatim_300.json --corpus valid.txt test.txt --records 100

Per layer: the share eta of the remaining residual that it takes; how far its effect at the value site is from that
share (drift); how far the layers between it and the value site are from the identity (``sensitivity``); both sides of
theorem 2; and what remains of the residual when it is edited alone, fact by fact. Then N_eff, the drift of the causal
scores, and Kendall's tau of scores and single-layer fits, beside that of the mere layer numbers. Written to ``--json
FILE``, and beside it as CSV, Markdown and PNG.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import matplotlib.pyplot as plt
from cakeflow_theory import ResidualDrift, ScoreAlignment, ScoreDrift, WeightShiftBound
from sweep import Sweep, parser, write_table

from cakeflow import read_requests
from cakeflow.report import plot_layers, save_plot
from cakeflow.storage import write_text

PER_LAYER = ("share", "drift", "sensitivity", "shift_error", "shift_limit", "left_alone")
PANELS = (("share",), ("drift",), ("sensitivity",), ("shift_error", "shift_limit"), ("left_alone",))
OVERALL = ("n_eff", "drift", "target/left", "score_drift", "alignment", "alignment_of_depth")


def measure(sweep: Sweep, method: str) -> dict[str, float]:
    """Everything that was logged in the one batch."""
    callbacks = ResidualDrift(), WeightShiftBound(), ScoreAlignment(), ScoreDrift()
    editor = sweep.editor(method, {}, *callbacks)
    logged = editor.fit(sweep.requests, evaluate=False).logged
    editor.rollback()
    return logged


def main() -> None:
    """Measure, print, draw."""
    options = parser(__doc__)
    options.set_defaults(json=Path(__file__).with_name("results") / "table5.json")
    options.add_argument("--method", default="cake_paper")
    args = options.parse_args()
    requests = read_requests(args.data)[args.first : args.first + args.records]
    logged = measure(Sweep(requests, args.corpus, args.tokens), args.method)
    write_text(args.json, json.dumps(logged, indent=1))
    layers = sorted({int(name[5 : name.index("/")]) for name in logged if name.startswith("layer")})
    rows = [
        {"layer": str(layer), **{name: f"{logged.get(f'layer{layer}/{name}', math.nan):.4f}" for name in PER_LAYER}}
        for layer in layers
    ]
    overall = [f"- {name}: {logged[name]:.4f}" for name in OVERALL]
    write_table(args.json, f"{args.method}, {len(requests)} records from {args.first}", rows, ["", *overall])
    _, axes = plt.subplots(1, len(PANELS), figsize=(3 * len(PANELS), 2.8), layout="tight")
    for ax, names in zip(axes, PANELS, strict=True):
        plot_layers(logged, names, ax)
    save_plot(axes[0], args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
