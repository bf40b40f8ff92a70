"""Draw the three rates of some runs: python docs/images/methods.py RUNS.csv IMAGE.

The CSV is that of ``cakeflow compare RUN ... --csv RUNS.csv``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
import pandas as pd

mpl.use("Agg")
import matplotlib.pyplot as plt

RATES = ("efficacy", "generalization", "specificity")
COLORS = ("#9aa5b1", "#6c9bd2", "#3f6fa8", "#e39a3b", "#7fb069", "#b56b8f")


def draw(table: pd.DataFrame, image: Path) -> None:
    """Draw a bar with its 95 % interval for every rate and run.

    Args:
        table: A row per run.
        image: File of the image.
    """
    figure, ax = plt.subplots(figsize=(7.6, 2.8), layout="constrained")
    width = 0.8 / len(table)
    for place, (row, color) in enumerate(zip(table.to_dict("records"), COLORS * len(table), strict=False)):
        at = [index + place * width for index in range(len(RATES))]
        means = [100 * row[rate] for rate in RATES]
        spans = [[100 * abs(row[rate] - row[f"{rate}_{end}"]) for rate in RATES] for end in ("low", "high")]
        ax.bar(at, means, 0.9 * width, color=color, label=Path(row["run"]).name)
        ax.errorbar(at, means, yerr=spans, fmt="none", ecolor="#222222", capsize=3, linewidth=1)
    ax.set_xticks([index + 0.4 - width / 2 for index in range(len(RATES))], RATES)
    ax.set(ylabel="%", ylim=(0, 105))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(ncols=len(table), frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.savefig(image, dpi=130)


if __name__ == "__main__":
    draw(pd.read_csv(sys.argv[1]), Path(sys.argv[2]))
