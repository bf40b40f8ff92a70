"""How the window of layers that a causal trace proposes ranks among all windows, when facts are really edited there.

    python benchmarks/reproduce/layers.py --data verbatim_300.json --corpus valid.txt test.txt --first 100 \
        --json layers.json --figure layers.png

The trace sees built-in facts only. Every window is then edited with the same 100 records and the same settings, and
judged by EditScore (harmonic mean of Efficacy, Generalization and Specificity). Prints how the proposed window ranks,
and Spearman's correlation between what a window recovers and how well it can be edited.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sweep import parser, show, start
from torchmetrics.functional import spearman_corrcoef

from cakeflow.report import save_plot
from cakeflow.tracing import locate


def figure(first: list[int], recovered: list[float], scores: list[float], proposed: int, path: Path) -> None:
    """Both curves over the windows."""
    ax = plt.figure(figsize=(7, 3.5), layout="tight").gca()
    ax.plot(first, scores, "o-", color="tab:orange", label="EditScore after 100 edits")
    ax.axvline(proposed, color="grey", linestyle="--", linewidth=0.8, label="proposed")
    ax.set(xlabel="first of five layers", ylabel="EditScore", xticks=first)
    other = ax.twinx()
    other.plot(first, recovered, "s-", color="tab:purple", label="recovered by the trace")
    other.set_ylabel("probability recovered")
    lines = [*ax.get_lines(), *other.get_lines()]
    ax.legend(lines, [str(line.get_label()) for line in lines], loc="lower left", fontsize="small")
    save_plot(ax, path)


def main() -> None:
    """Trace, edit window by window, compare."""
    options = parser(__doc__)
    options.add_argument("--method", default="alphaedit")
    options.add_argument("--starts", type=int, nargs="+", help="first layers of the windows; default: every other one")
    options.add_argument("--facts", type=int, default=60, help="known facts to trace")
    options.add_argument("--figure", type=Path)
    args = options.parse_args()
    row = start(args)
    proposal = locate(row.lm, limit=args.facts)
    width, proposed = len(proposal.layers), proposal.layers[0]
    print(f"proposed: {proposal.layers}; {proposal.reason}")
    recovered = {middle - width // 2: score for middle, score in proposal.trace.scores.items()}
    starts = sorted({*(args.starts or range(0, row.lm.depth - width + 1, 2)), proposed})
    show("before", row("before"))
    for first in starts:
        layers = list(range(first, first + width))
        show(f"{layers}, recovered {recovered[first]:.4f}", row(f"{args.method} {layers}", args.method, layers=layers))
    score = {first: row(f"{args.method} {[*range(first, first + width)]}")["editscore"] for first in starts}
    rank = sorted(starts, key=lambda first: -score[first]).index(proposed) + 1
    gains, scores = ([each[first] for first in starts] for each in (recovered, score))
    rho = spearman_corrcoef(torch.tensor(gains), torch.tensor(scores))
    best, median = max(score.values()), statistics.median(score.values())
    print(
        f"the proposed window from layer {proposed} ranks {rank} of {len(starts)} by EditScore "
        f"({100 * score[proposed]:.1f}; best {100 * best:.1f}, median {100 * median:.1f})"
    )
    print(f"Spearman's rho over the windows: {float(rho):.2f}")
    if args.figure:
        figure(starts, gains, scores, proposed, args.figure)


if __name__ == "__main__":
    main()
