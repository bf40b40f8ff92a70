"""Sizes of differences between changes, compared with norms of dense matrices."""

import math

import pytest
import torch
from toy_changes import Scaled

from cakeflow.core.sizes import Sizes
from cakeflow.journal.changes import WeightChange
from cakeflow.journal.schema import BatchBody
from cakeflow.journal.steps import AppliedChange, EditStep
from cakeflow.solvers.problem import Update


class _Store:
    """Steps by the numbers of their batches."""

    def __init__(self, *batches):
        self.steps = [EditStep((), [AppliedChange(each, {}) for each in changes]) for changes in batches]

    def read_step(self, entry):
        return self.steps[entry.batch]


def entry(number):
    return BatchBody(batch=number, files={}, hashes=[], targets=[], numbers={}, changes=[])


def factors(seed, rank=2):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(rank, width, generator=generator, dtype=torch.float64) for width in (5, 7))
    return left, right


def change(seed, place="w"):
    left, right = factors(seed)
    return WeightChange(place, Update(right, left))


def dense(*seeds):
    return sum(left.T @ right for left, right in map(factors, seeds))


def test_updates_of_a_batch_are_added_and_weights_drift_apart_over_batches():
    sizes = Sizes(_Store([change(0), change(1)], [change(2)]), _Store([change(3)], [change(4)]), {"w": 10.0})
    update, weight = sizes.of_batch(entry(0), entry(0), ["w"])["w"]
    apart = dense(3) - dense(0, 1)
    assert update == pytest.approx(float(apart.norm() / dense(0, 1).norm()), rel=1e-12)
    assert weight == pytest.approx(float(apart.norm() / 10), rel=1e-12)
    update, weight = sizes.of_batch(entry(1), entry(1), ["w"])["w"]
    assert update == pytest.approx(float((dense(4) - dense(2)).norm() / dense(2).norm()), rel=1e-12)
    assert weight == pytest.approx(float((apart + dense(4) - dense(2)).norm() / 10), rel=1e-12)


def test_a_batch_on_one_side_counts_whole():
    sizes = Sizes(_Store([change(0)]), _Store(), {"w": 10.0})
    assert sizes.of_batch(entry(0), None, ["w"])["w"] == pytest.approx((1, float(dense(0).norm() / 10)))
    sizes = Sizes(_Store(), _Store([change(0)]), {"w": 10.0})
    update, weight = sizes.of_batch(None, entry(0), ["w"])["w"]
    assert math.isnan(update)
    assert weight == pytest.approx(float(dense(0).norm() / 10))


def test_modules_are_compared_by_their_tensors():
    one, other = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0])
    sizes = Sizes(_Store([Scaled("m", one)]), _Store([Scaled("m", other)]))
    update, weight = sizes.of_batch(entry(0), entry(0), ["m"])["m"]
    assert update == pytest.approx(1 / 5)
    assert math.isnan(weight)
    sizes = Sizes(_Store([Scaled("m", one)]), _Store([Scaled("m", one[:1])]))
    assert math.isnan(sizes.of_batch(entry(0), entry(0), ["m"])["m"][0])


def test_without_tensors_nothing_is_known_and_equal_places_are_not_read():
    assert all(map(math.isnan, Sizes(None, _Store()).of_batch(entry(0), entry(0), ["w"])["w"]))
    assert Sizes(_Store(), _Store()).of_batch(entry(0), entry(0), []) == {}
