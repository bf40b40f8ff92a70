"""Means and intervals over records, against independent computations."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cakeflow.report import RunFolder
from cakeflow.report.intervals import Interval, harmonic, record_values


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30), st.integers(0, 3))
def test_an_interval_is_the_normal_one_over_what_is_known(values, missing):
    found = Interval.of(np.array([*values, *[math.nan] * missing]))
    error = statistics.stdev(values) / math.sqrt(len(values))
    assert found.mean == pytest.approx(statistics.fmean(values), abs=1e-12)
    assert found.half == pytest.approx(statistics.NormalDist().inv_cdf(0.975) * error, abs=1e-9)


def test_one_record_has_no_interval():
    assert Interval.of(np.array([0.5])).mean == 0.5
    assert math.isnan(Interval.of(np.array([0.5])).half)
    assert math.isnan(Interval.of(np.array([math.nan])).mean)


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
    samples = (parts[:, draw.integers(0, 300, 300)].mean(axis=1) for _ in range(2000))
    spread = 1.96 * np.std([statistics.harmonic_mean(sample) for sample in samples])
    assert Interval.of(harmonic(list(parts))).half == pytest.approx(spread, rel=0.08)


def test_a_score_without_a_part():
    ones, zeros, none = np.ones(4), np.zeros(4), np.full(4, math.nan)
    assert Interval.of(harmonic([ones, zeros, ones])) == Interval(0.0, 0.0)
    assert math.isnan(Interval.of(harmonic([ones, none, zeros])).mean)
