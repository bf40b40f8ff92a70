"""Metrics of images against counting by hand."""

import math

import pytest
import torch
from cakeflow_vision import EditSuccess, GroupGeneralization, LabelLocality, MirrorAccuracy, WorstGroup

from cakeflow.errors import ConfigError

KIND = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 3, 3])
RIGHT = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 1, 0]).bool()
AGREES = torch.tensor([0, 0, 0, 0, 0, 1, 1, 0, 0, 0]).bool()
MARGIN = torch.tensor([0, 0, 0, 0, 0, 0.01, 0.9, 0.02, 0, 0])
RIGHT_BEFORE = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 0, 0]).bool()


def value(metric, *names):
    fields = {"kind": KIND, "right": RIGHT, "agrees": AGREES, "margin": MARGIN, "right_before": RIGHT_BEFORE}
    for part in (slice(0, 4), slice(4, None)):
        metric.update(*(fields[name][part] for name in names))
    return float(metric.compute())


def test_shares_are_of_the_right_pictures():
    assert value(EditSuccess(), "kind", "right") == 1 / 2
    assert value(GroupGeneralization(), "kind", "right") == pytest.approx(2 / 3)
    assert value(MirrorAccuracy(), "kind", "right") == 1 / 2
    names = ("kind", "agrees", "margin", "right_before")
    assert value(LabelLocality(), *names) == pytest.approx(2 / 3)
    assert value(LabelLocality(0.05), *names) == 0.0
    assert value(LabelLocality(0.95), *names) == 1 / 2


def test_the_official_count_has_the_edited_pictures_and_one_less():
    """(right - 1) / N: three of five are right, the edited ones among them."""
    assert value(GroupGeneralization("official"), "kind", "right") == pytest.approx((3 - 1) / 5)
    with pytest.raises(ConfigError, match="counting"):
        GroupGeneralization("other")


def test_the_worst_group_has_the_lowest_accuracy():
    metric = WorstGroup()
    metric.update(torch.tensor([True, True, False]), torch.tensor([True, True, True]), torch.tensor([4, 4, -1]))
    metric.update(torch.tensor([True, False, False, False]), torch.tensor([True] * 3 + [False]), torch.tensor([9] * 4))
    assert float(metric.compute()) == pytest.approx(1 / 3)


def test_without_pictures_there_is_no_number():
    metric, worst = EditSuccess(), WorstGroup()
    metric.update(torch.tensor([1]), torch.tensor([True]))
    worst.update(torch.tensor([True]), torch.tensor([False]), torch.tensor([4]))
    assert math.isnan(float(metric.compute()))
    assert math.isnan(float(worst.compute()))
