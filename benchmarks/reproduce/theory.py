"""CAKE's theory, measured on one batch of edits (appendices A.5 and B.5, figure 5, table 5).

    python benchmarks/reproduce/theory.py --data verbatim_300.json --corpus valid.txt test.txt --records 100 \
        --json theory.json --figure theory.png

Per layer: the share eta of what is left that it takes; how far its effect at the anchor is from that share (drift);
how far the layers between it and the anchor are from the identity (``sensitivity``); both sides of theorem 2; and what
remains of the residual when it is edited alone, fact by fact. Then N_eff, the drift of the causal scores, and Kendall's
tau of scores and single-layer fits, beside that of the mere layer numbers.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
from sweep import Sweep, parser

from cakeflow import read_requests
from cakeflow.callbacks import ResidualDrift, ScoreAlignment, ScoreDrift, WeightShiftBound
from cakeflow.report import plot_layers, save_plot

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
    options.add_argument("--method", default="cake_paper")
    options.add_argument("--figure", type=Path)
    args = options.parse_args()
    requests = read_requests(args.data)[args.first : args.first + args.records]
    logged = measure(Sweep(requests, args.corpus, args.tokens), args.method)
    layers = sorted({int(name[5 : name.index("/")]) for name in logged if name.startswith("layer")})
    print(f"{args.method}, {len(requests)} records from {args.first}")
    print(f"{'layer':>6s}" + "".join(f"{name:>14s}" for name in PER_LAYER))
    for layer in layers:
        print(
            f"{layer:6d}" + "".join(f"{logged.get(f'layer{layer}/{name}', float('nan')):14.4f}" for name in PER_LAYER)
        )
    for name in OVERALL:
        print(f"{name:20s}{logged[name]:10.4f}")
    if args.json:
        args.json.write_text(json.dumps(logged, indent=1))
    if args.figure:
        _, axes = plt.subplots(1, len(PANELS), figsize=(3 * len(PANELS), 2.8), layout="tight")
        for ax, names in zip(axes, PANELS, strict=True):
            plot_layers(logged, names, ax)
        save_plot(axes[0], args.figure)


if __name__ == "__main__":
    main()
