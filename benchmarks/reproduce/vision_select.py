"""Choose the numbers of the recipe ``vit_gradient_ridge`` on splits that no table reports.

    python benchmarks/reproduce/vision_select.py [--draws 3]

Edited are 16 wrong images of the split ``edit``. GR is measured on the other wrong ones of that split, LR on the half
of ``unrelated`` that the edit does not see (both halves in turn), and the mirror on sneakers of ``train`` that are put
on grass. Printed is the mean over draws and halves for each learning rate of the gradient targets, share of the ridge,
and weight of all unrelated images together, ``preserve`` times their number, which is what the solve depends on. The
recipe is the row with SR >= 95, GR >= 80 and LR >= 97 that has the highest mirror.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import torch
from cakeflow_vision import GradientTargets, RelativeRidge, TargetProblem, representations
from fashion import GRASS, SANDAL, SNEAKER, Data, backbone, load
from torch import Tensor

from cakeflow.models import VisionModel
from cakeflow.solvers import Covariance, LayerProblem

COUNT, MIRROR = 16, 120
GRID = {"weight": (20, 40), "share": (0.01, 0.1, 0.2, 0.3, 0.5), "lr": (0.01, 0.015, 0.0175, 0.02, 0.03, 0.05)}
HEAD = "classifier"


def features(vm: VisionModel, data: Data) -> tuple[Tensor, Tensor, Tensor]:
    """Representations of the splits ``edit`` and ``unrelated``, and of sneakers of ``train`` on grass."""
    sneakers = [row for row in data.rows("train") if data.arrays["labels"][row] == SNEAKER][:MIRROR]
    parts = (data.images("edit"), data.images("unrelated"), [data.compose(row, GRASS) for row in sneakers])
    edit, unrelated, mirror = (representations(vm, vm.pixels(images))[0][HEAD] for images in parts)
    return edit, unrelated, mirror


def change(vm: VisionModel, own: Tensor, others: Tensor, weight: float, share: float, lr: float) -> Tensor:
    """The classifier's change by gradient targets and a ridge."""
    labels, empty = torch.full((len(own),), SANDAL), torch.empty(0)
    targets = GradientTargets(lr=lr).targets(vm, TargetProblem(empty, labels, {HEAD: own}, empty)).values[HEAD]
    keys, rows, matrix = own.double(), others.double(), vm.oriented(f"{HEAD}.weight").double()
    covariance = Covariance(rows.T @ rows / len(rows), weight=weight)
    residual = (targets.double() - keys) @ matrix.T
    problem = LayerProblem(keys, residual, weight=matrix, original_weight=matrix, covariance=covariance)
    return RelativeRidge(share).solve(problem).dense


def main() -> None:
    """Print a row for every combination."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help="the wheel that the model is converted from, once")
    parser.add_argument("--draws", type=int, default=3, help="draws of the edited images")
    options = parser.parse_args()
    vm = load(backbone(options.wheel))
    edit, unrelated, mirror = features(vm, Data())
    matrix, bias = vm.oriented(f"{HEAD}.weight").double(), vm.module(HEAD).bias.detach().double()

    def labels(rows: Tensor, change: Tensor | float = 0.0) -> Tensor:
        return (rows.double() @ (matrix + change).T + bias).argmax(1)

    wrong = edit[labels(edit) != SANDAL]
    halves = torch.randperm(len(unrelated), generator=torch.Generator().manual_seed(1)).chunk(2)
    print(f"{len(wrong)} wrong images; mirror before {100 * float((labels(mirror) == SNEAKER).double().mean()):.1f}")
    print(f"{'weight':>8}{'share':>8}{'lr':>8}{'SR':>8}{'GR':>8}{'LR':>8}{'mirror':>8}")
    for values in product(*GRID.values()):
        rows = []
        for draw, half in product(range(options.draws), (0, 1)):
            order = torch.randperm(len(wrong), generator=torch.Generator().manual_seed(100 + draw))
            own, same, kept = wrong[order[:COUNT]], wrong[order[COUNT:]], unrelated[halves[1 - half]]
            new = change(vm, own, unrelated[halves[half]], **dict(zip(GRID, values, strict=True)))
            right = [labels(own, new) == SANDAL, labels(same, new) == SANDAL, labels(kept, new) == labels(kept)]
            rows.append([float(each.double().mean()) for each in (*right, labels(mirror, new) == SNEAKER)])
        means = (100 * torch.tensor(rows).mean(0)).tolist()
        print("".join(f"{value:8g}" for value in values) + "".join(f"{value:8.1f}" for value in means), flush=True)


if __name__ == "__main__":
    main()
