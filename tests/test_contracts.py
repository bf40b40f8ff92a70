"""Who breaks a contract in the walk is named, and the batch is taken back."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from conftest import fit_tiny

from cakeflow import LeastSquares, Sequential, TargetOptimizer, Update
from cakeflow.allocators import Turn
from cakeflow.architecture import Site
from cakeflow.contracts import checked_residual
from cakeflow.errors import NumericalError, ShapeError

LAYERS = [1, 2, 4]


class Narrow(Sequential):
    def shares(self, weights):
        return super().shares(weights).repeat(2)


class Greedy(Sequential):
    def shares(self, weights):
        return super().shares(weights) * 1.5


class Leaving(Sequential):
    def shares(self, weights):
        return super().shares(weights) * 0.9


class Lost(Sequential):
    def shares(self, weights):
        return super().shares(weights) * float("nan")


@dataclass(frozen=True)
class Wrong(LeastSquares):
    """Right on the first layer, wrong on the second."""

    spoil: str = "shape"
    calls: ClassVar[list[int]] = []

    def solve(self, problem):
        update = super().solve(problem)
        self.calls.append(1)
        if len(self.calls) == 1:
            return update
        return Update(update.right[:, 1:] if self.spoil == "shape" else update.right * float("inf"), update.left)


@pytest.mark.parametrize(
    ("part", "error", "words"),
    [
        ({"allocator": Narrow()}, ShapeError, r"test_contracts.Narrow: \(3,\) weights gave \(6,\) shares"),
        ({"allocator": Greedy()}, ShapeError, r"test_contracts.Greedy: shares must lie in \(0, 1\]"),
        ({"allocator": Leaving()}, ShapeError, "test_contracts.Leaving: the last layer must take all that is left"),
        ({"allocator": Lost()}, NumericalError, "test_contracts.Lost: what it gives layer 1 is not finite"),
        ({"solver": Wrong()}, ShapeError, "test_contracts.Wrong: layer 2 needs an update of shape"),
        ({"solver": Wrong(spoil="values")}, NumericalError, "test_contracts.Wrong: layer 2: .* not finite"),
    ],
)
def test_the_class_is_named_and_nothing_stays(lm, requests, quiet, part, error, words):
    Wrong.calls.clear()
    before = lm.fingerprint()
    with pytest.raises(error, match=words):
        fit_tiny(lm, LAYERS, requests[:2], quiet, 1.0, targets=TargetOptimizer(steps=2, lr=0.3), **part)
    assert lm.fingerprint() == before


def test_a_fact_without_weight_takes_nothing():
    weights = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    turn, missing = Turn(Site(1, "mlp_out"), Site(2), 1, weights), torch.ones(3, 4, dtype=torch.float64)
    given = Sequential().allocate(missing, turn)
    assert checked_residual(Sequential(), given, missing, turn)[:, 0].tolist() == [1.0, 0.0, 1.0]
