"""Means and intervals over records, against independent computations."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import binomtest

from cakeflow.report import RunFolder
from cakeflow.report.intervals import Interval, harmonic, paired, record_values


def covers(draws, truth, least=0.0):
    """Share of the draws whose interval has the truth in it."""
    intervals = (Interval.of(values, least) for values in draws)
    return statistics.fmean(each.low <= truth <= each.high for each in intervals)


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=60), st.integers(0, 3))
def test_a_share_of_records_has_wilsons_interval_over_what_is_known(values, missing):
    bounds = binomtest(int(sum(values)), len(values)).proportion_ci(method="wilson")
    interval = Interval.of(np.array([*values, *[math.nan] * missing]))
    assert interval.mean == pytest.approx(statistics.fmean(values), abs=1e-12)
    assert (interval.low, interval.high) == pytest.approx((bounds.low, bounds.high), abs=1e-9)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.sampled_from([0.0, -1.0]))
def test_no_interval_has_the_width_0_or_leaves_out_its_mean(values, least):
    interval = Interval.of(np.array(values), least)
    assert least <= interval.low <= interval.mean <= interval.high <= 1
    assert len(set(values)) > 1 or interval.high - interval.low > 0.05


def test_what_agrees_counts_by_its_number_of_records():
    bounds = binomtest(40, 40).proportion_ci(method="wilson")
    assert Interval.of(np.ones(40)) == Interval(1.0, pytest.approx(bounds.low), 1.0)
    few, many = (Interval.of(np.zeros(count), least=-1.0) for count in (10, 1000))
    assert few.low == -few.high < many.low == -many.high < 0
    assert many.high < 0.003


def test_nothing_judged_has_no_interval():
    interval = Interval.of(np.array([math.nan]))
    assert all(math.isnan(value) for value in (interval.mean, interval.low, interval.high))


@pytest.mark.parametrize("share", [0.95, 0.9, 0.8, 0.5, 0.2])
def test_a_share_of_twelve_records_is_covered(share):
    draws = np.random.default_rng(0).random((2000, 12)) < share
    assert covers(draws.astype(float), share) >= 0.93


@pytest.mark.parametrize(
    ("prompts", "share", "floor"), [(3, 0.95, 0.95), (3, 0.8, 0.93), (10, 0.8, 0.92), (10, 0.95, 0.88)]
)
def test_means_over_prompts_of_twenty_records_are_covered(prompts, share, floor):
    """The records' chances differ: more prompts do not make up for few records."""
    draw = np.random.default_rng(0)
    chances = draw.beta(share * 7 / 3, (1 - share) * 7 / 3, (2000, 20))  # intraclass correlation 0.3
    assert covers(draw.binomial(prompts, chances) / prompts, share) >= floor


@pytest.mark.parametrize(("count", "floor"), [(2, 0.93), (9, 0.93), (12, 0.93), (20, 0.89), (60, 0.92)])
@pytest.mark.parametrize(("gain", "loss"), [(0.1, 0.1), (0.5, 0.1), (0.9, 0.02)])
def test_differences_of_pairs_are_covered(count, floor, gain, loss):
    luck = np.random.default_rng(0).random((2000, count))
    differences = np.where(luck < gain, 1.0, np.where(luck < gain + loss, -1.0, 0.0))
    assert covers(differences, gain - loss, least=-1.0) >= floor


@pytest.mark.parametrize("count", [2, 9, 19])
def test_means_over_prompts_of_few_records_are_covered(count):
    draw = np.random.default_rng(0)
    assert covers(draw.binomial(3, 0.8, (2000, count)) / 3, 0.8) >= 0.93


def test_the_same_records_have_the_same_interval():
    values = np.random.default_rng(0).random(50)
    assert Interval.of(values) == Interval.of(values)


def test_records_that_were_asked_otherwise_are_not_paired(run_folder):
    records = RunFolder.read(run_folder).after
    other = records[0].model_copy(
        update={"prompts": [each.model_copy(update={"prompt": f"{each.prompt}!"}) for each in records[0].prompts]}
    )
    assert paired(records, records)["efficacy"].mean == 0
    assert paired(records, [other, *records[1:]]) == {}


def test_a_record_counts_with_the_mean_over_its_prompts(run_folder):
    records = RunFolder.read(run_folder).after
    values = record_values(records)
    for record, value in zip(records, values["generalization"], strict=True):
        asked = [prompt for prompt in record.prompts if prompt.kind == "paraphrase"]
        if record.target_true is None:
            assert math.isnan(value)
        else:
            assert value == statistics.fmean(prompt.expected_logprob > prompt.rival_logprob for prompt in asked)
    assert values["efficacy_exact"].tolist() == [1.0] * 12


@given(arrays(np.float64, (3, 8), elements=st.floats(0.1, 1)))
def test_the_score_is_the_harmonic_mean_and_moves_with_records_as_its_derivative_says(parts):
    values, means = harmonic(parts), parts.mean(axis=1)
    score = statistics.harmonic_mean(means)
    assert values.mean() == pytest.approx(score, rel=1e-9)
    nudge, moved = 1e-6, means.copy()
    deviations = parts[:, 0] - means
    moved += nudge * deviations
    slope = (statistics.harmonic_mean(moved) - score) / nudge
    assert values[0] - score == pytest.approx(slope, abs=1e-4)


def test_the_scores_interval_agrees_with_a_bootstrap():
    draw = np.random.default_rng(0)
    parts = (draw.random((3, 300)) < np.array([[0.9], [0.6], [0.75]])).astype(float)
    samples = [statistics.harmonic_mean(parts[:, draw.integers(0, 300, 300)].mean(axis=1)) for _ in range(2000)]
    interval = Interval.of(harmonic(list(parts)))
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(samples, [0.025, 0.975])), abs=0.008)


def test_a_score_without_a_part():
    ones, zeros, none = np.ones(4), np.zeros(4), np.full(4, math.nan)
    assert Interval.of(harmonic([ones, zeros, ones])) == Interval.of(zeros)
    assert math.isnan(Interval.of(harmonic([ones, none, zeros])).mean)
