"""Efficacy, generalization and specificity: hand-worked cases, and an independent implementation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics import Metric, MetricCollection

from cakeflow.metrics import KINDS, Efficacy, Generalization, Specificity
from cakeflow.metrics.preference import record_means

METRICS = {"rewrite": Efficacy, "paraphrase": Generalization, "neighborhood": Specificity}
NAN = math.nan

# (record, kind, wanted, rival, correct): two records, worked by hand
CASE = [
    (0, "rewrite", -1.0, -2.0, False),
    (0, "paraphrase", -1.0, -2.0, True),
    (0, "paraphrase", -3.0, -2.0, True),
    (0, "neighborhood", -1.0, -4.0, False),
    (0, "neighborhood", -2.0, -4.0, False),
    (0, "neighborhood", -5.0, -4.0, True),
    (0, "neighborhood", -6.0, -4.0, False),
    (1, "rewrite", -2.0, -2.0, True),  # equal is not more likely
    (1, "paraphrase", -1.0, -1.5, False),
    (1, "neighborhood", -1.0, NAN, True),
    (1, "neighborhood", -1.0, -1.1, False),
]
BY_HAND = {
    ("rewrite", "probability"): (1 + 0) / 2,
    ("paraphrase", "probability"): (1 / 2 + 1) / 2,  # over prompts alone it would be 2/3
    ("neighborhood", "probability"): (2 / 4 + 1) / 2,  # the prompt without a rival does not count
    ("rewrite", "exact"): (0 + 1) / 2,
    ("paraphrase", "exact"): (1 + 0) / 2,
    ("neighborhood", "exact"): (1 / 4 + 1 / 2) / 2,
}


def tensors(rows):
    """Rows as the arguments of ``update``."""
    record, kind, expected, rival, correct = (list(column) for column in zip(*rows, strict=True)) if rows else [[]] * 5
    return {
        "expected": torch.tensor(expected, dtype=torch.float64),
        "rival": torch.tensor(rival, dtype=torch.float64),
        "correct": torch.tensor(correct, dtype=torch.bool),
        "record": torch.tensor(record, dtype=torch.long),
        "kind": torch.tensor([KINDS.index(name) for name in kind], dtype=torch.long),
    }


def slowly(rows, kind, form):
    """The definition, in plain Python."""
    records = {}
    for record, name, expected, rival, correct in rows:
        if name == kind and (form == "exact" or not math.isnan(rival)):
            records.setdefault(record, []).append(correct if form == "exact" else expected > rival)
    means = [sum(hits) / len(hits) for hits in records.values()]
    return sum(means) / len(means) if means else NAN


@pytest.mark.parametrize(("kind", "form"), BY_HAND)
def test_by_hand(kind, form):
    metric = METRICS[kind](form)
    metric.update(**tensors(CASE))
    assert float(metric.compute()) == pytest.approx(BY_HAND[kind, form])
    assert slowly(CASE, kind, form) == pytest.approx(BY_HAND[kind, form])


def test_probability_is_the_default_form():
    metric = Specificity()
    metric.update(**tensors(CASE))
    assert float(metric.compute()) == 0.75


@pytest.mark.parametrize("kind", [*METRICS])
@pytest.mark.parametrize("form", ["probability", "exact"])
def test_nothing_to_judge_is_nan(kind, form):
    metric = METRICS[kind](form)
    other = next(name for name in KINDS if name != kind)
    metric.update(**tensors([(0, other, -1.0, -2.0, True)]))
    assert metric.compute().isnan()


def test_only_unjudged_prompts_are_nan_by_probability_and_count_by_exact_match():
    rows = [(0, "rewrite", -1.0, NAN, True), (1, "rewrite", -1.0, NAN, False)]
    judged, exact = Efficacy(), Efficacy("exact")
    judged.update(**tensors(rows))
    exact.update(**tensors(rows))
    assert judged.compute().isnan()
    assert float(exact.compute()) == 0.5


def test_a_record_without_judged_prompts_is_left_out():
    metric = Efficacy()
    metric.update(**tensors([(0, "rewrite", -1.0, NAN, True), (1, "rewrite", -1.0, -2.0, True)]))
    assert float(metric.compute()) == 1.0


def test_record_means():
    value, record = torch.tensor([1.0, 0.0, NAN, 1.0, NAN]), torch.tensor([4, 4, 4, 0, 2])
    assert record_means(value, record).tolist() == [1.0, 0.5]
    assert record_means(value[:0], record[:0]).tolist() == []


NUMBER = st.sampled_from([-3.0, -2.5, -2.0, -1.0])
ROW = st.tuples(st.integers(0, 5), st.sampled_from(KINDS), NUMBER, NUMBER | st.just(NAN), st.booleans())
ROWS = st.lists(ROW, min_size=1, max_size=30)


@pytest.mark.parametrize("kind", [*METRICS])
@pytest.mark.parametrize("form", ["probability", "exact"])
@given(rows=ROWS)
def test_against_the_definition(kind, form, rows):
    metric = METRICS[kind](form)
    metric.update(**tensors(rows))
    assert float(metric.compute()) == pytest.approx(slowly(rows, kind, form), abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("kind", [*METRICS])
@given(rows=ROWS, cut=st.integers(0, 6))
def test_batches_of_whole_records_give_the_same_value(kind, rows, cut):
    whole, parts = METRICS[kind](), METRICS[kind]()
    whole.update(**tensors(rows))
    for chosen in ([row for row in rows if row[0] < cut], [row for row in rows if row[0] >= cut]):
        numbers = sorted({row[0] for row in chosen})  # each batch counts its records from 0
        parts.update(**tensors([(numbers.index(row[0]), *row[1:]) for row in chosen]))
    assert float(parts.compute()) == pytest.approx(float(whole.compute()), abs=1e-6, nan_ok=True)


def test_prompts_may_come_in_any_order():
    forward, backward = Specificity(), Specificity()
    forward.update(**tensors(CASE))
    backward.update(**tensors(CASE[::-1]))
    assert torch.equal(forward.compute(), backward.compute())


def test_reset_forgets():
    metric = Efficacy()
    metric.update(**tensors([(0, "rewrite", -9.0, -1.0, False)]))
    metric.reset()
    metric.update(**tensors([(0, "rewrite", -1.0, -9.0, False)]))
    assert float(metric.compute()) == 1.0


def test_they_work_in_a_collection():
    metrics = MetricCollection({name: kind() for name, kind in METRICS.items()})
    value = metrics(**tensors(CASE))
    assert {name: float(v) for name, v in value.items()} == pytest.approx(
        {kind: BY_HAND[kind, "probability"] for kind in METRICS}
    )
    metrics.update(**tensors(CASE))
    assert {name: float(v) for name, v in metrics.compute().items()} == pytest.approx(
        {kind: BY_HAND[kind, "probability"] for kind in METRICS}
    )


@pytest.mark.parametrize("kind", [*METRICS])
def test_a_misspelt_form_is_refused(kind):
    with pytest.raises(ValueError, match="form"):
        METRICS[kind]("probabilty")


def test_they_are_torchmetrics():
    for metric in METRICS.values():
        assert issubclass(metric, Metric)
        assert metric.higher_is_better
