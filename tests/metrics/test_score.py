"""The harmonic mean of the three rates."""

import math
from statistics import harmonic_mean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics import MetricCollection

from cakeflow.metrics import KINDS, EditScore, Efficacy, Generalization, Specificity

# (record, kind, succeeds by probability, is the arg-max): two records, worked by hand
CASE = [
    (0, 0, True, True),
    (0, 1, True, False),
    (0, 1, False, False),
    (0, 2, True, True),
    (1, 0, False, True),
    (1, 1, True, True),
    (1, 2, False, True),
    (1, 2, True, False),
    (1, 2, True, False),
    (1, 2, True, False),
]


def tensors(rows):
    """Rows as the arguments of ``update``; None stands for a prompt without a rival."""
    record, kind, success, correct = (list(column) for column in zip(*rows, strict=True))
    rival = torch.tensor([math.nan if one is None else (-2.0 if one else -0.5) for one in success])
    return {
        "expected": torch.full((len(rows),), -1.0),
        "rival": rival,
        "correct": torch.tensor(correct),
        "record": torch.tensor(record),
        "kind": torch.tensor(kind),
    }


def score(rows, form="probability"):
    metric = EditScore(form)
    metric.update(**tensors(rows))
    return float(metric.compute())


def test_by_hand():
    """Rates 1/2, (1/2 + 1)/2 and (1 + 3/4)/2; exact 1, 1/2 and (1 + 1/4)/2."""
    assert score(CASE) == pytest.approx(3 / (1 / 0.5 + 1 / 0.75 + 1 / 0.875))
    assert score(CASE, "exact") == pytest.approx(3 / (1 / 1 + 1 / 0.5 + 1 / 0.625))


def test_perfect_and_hopeless():
    assert score([(0, kind, True, True) for kind in range(3)]) == 1.0
    for bad in range(3):
        rows = [(0, kind, kind != bad, kind != bad) for kind in range(3)]
        assert score(rows) == score(rows, "exact") == 0.0


@pytest.mark.parametrize("missing", range(3))
@pytest.mark.parametrize("form", ["probability", "exact"])
def test_a_rate_that_cannot_be_judged_is_nan(missing, form):
    assert math.isnan(score([(0, kind, True, True) for kind in range(3) if kind != missing], form))
    unjudged = [(0, kind, None if kind == missing else True, True) for kind in range(3)]
    assert score(unjudged, form) == pytest.approx(math.nan if form == "probability" else 1.0, nan_ok=True)


ROW = st.tuples(st.integers(0, 4), st.integers(0, 2), st.sampled_from([True, False, None]), st.booleans())
ROWS = st.lists(ROW, min_size=1, max_size=40)


@pytest.mark.parametrize("form", ["probability", "exact"])
@given(rows=ROWS)
def test_it_is_the_harmonic_mean_of_the_three(form, rows):
    parts = [kind(form) for kind in (Efficacy, Generalization, Specificity)]
    for part in parts:
        part.update(**tensors(rows))
    rates = [float(part.compute()) for part in parts]
    expected = math.nan if any(map(math.isnan, rates)) else harmonic_mean(rates)
    assert score(rows, form) == pytest.approx(expected, abs=1e-6, nan_ok=True)


@given(rows=ROWS, size=st.integers(1, 5))
def test_batches_of_whole_records_give_the_same_value(rows, size):
    metric = EditScore()
    records = sorted({row[0] for row in rows})
    for start in range(0, len(records), size):
        chosen = records[start : start + size]
        metric.update(**tensors([(chosen.index(row[0]), *row[1:]) for row in rows if row[0] in chosen]))
    assert float(metric.compute()) == pytest.approx(score(rows), abs=1e-6, nan_ok=True)


def test_it_works_in_a_collection_and_forgets_on_reset():
    metrics = MetricCollection({"editscore": EditScore(), "efficacy": Efficacy()})
    metrics.update(**tensors([(0, kind, False, False) for kind in range(len(KINDS))]))
    metrics.reset()
    metrics.update(**tensors(CASE))
    assert float(metrics.compute()["editscore"]) == pytest.approx(score(CASE))
    assert float(metrics.compute()["efficacy"]) == 0.5


def test_a_misspelt_form_is_refused():
    with pytest.raises(ValueError, match="form"):
        EditScore("Exact")
