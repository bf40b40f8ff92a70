"""Tables of a suite against the answers in the run folders, counted by hand here."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from cakeflow.report.intervals import Interval
from cakeflow.storage.atomic import write_text
from cakeflow.suites import Rows, arms_of, read_suite, tables_of

OUT = Path("out")


def table(path):
    """The only table of a suite that was measured."""
    arms = arms_of(read_suite(path))
    (table,) = tables_of(arms, Rows(OUT).measure(arms), OUT)
    return arms, {line.method: line for line in table.lines}


def counted(arms, method, seeds=(0,)):
    """Per record of all seeds: whether its own prompt's target is likelier, and its free answer right."""
    records = []
    for seed in seeds:
        (arm,) = (arm for arm in arms if (arm.method, arm.seed) == (method, seed))
        records += map(json.loads, (OUT / "runs" / arm.name / "after.jsonl").read_text().splitlines())
    own = [next(each for each in record["prompts"] if each["kind"] == "rewrite") for record in records]
    return (
        np.array([float(each["expected_logprob"] > each["rival_logprob"]) for each in own]),
        np.array([float(each["answered"]) for each in own]),
    )


def test_metrics_and_paired_differences_are_those_of_the_records(write):
    arms, lines = table(write(sizes=[6], seeds=[0, 1]))
    assert [*lines] == ["memit_seq", "ultraedit", "single"]
    base = counted(arms, "memit_seq", (0, 1))
    for method, line in lines.items():
        likelier, answered = counted(arms, method, (0, 1))
        assert len(likelier) == 12
        assert line.metrics["efficacy"] == Interval.of(likelier)
        assert line.metrics["efficacy_answer"] == Interval.of(answered)
        if method == "memit_seq":
            assert all(math.isnan(each.mean) for each in line.differences.values())
        else:
            assert line.differences["efficacy"] == Interval.of(likelier - base[0], least=-1.0)
            assert line.differences["efficacy_answer"] == Interval.of(answered - base[1], least=-1.0)


def test_numbers_without_records_are_means_over_seeds_without_interval(write):
    _, lines = table(write(seeds=[0, 1]))
    base, line = lines["memit_seq"], lines["single"]
    mean = np.mean([row.metrics["knowledge/new"] for row in line.rows])
    assert line.metrics["knowledge/new"].mean == pytest.approx(mean)
    assert math.isnan(line.metrics["knowledge/new"].low)
    gap = line.metrics["knowledge/new"].mean - base.metrics["knowledge/new"].mean
    assert line.differences["knowledge/new"].mean == pytest.approx(gap)
    assert line.mean("seconds") == pytest.approx(np.mean([row.seconds for row in line.rows]))


def test_a_method_that_failed_on_a_seed_is_not_compared_in_means_over_seeds(write):
    arms = arms_of(read_suite(write(seeds=[0, 1], methods={"memit_seq": {}, "ultraedit": None})))
    rows = Rows(OUT).measure(arms)
    failed = [
        row.model_copy(update={"fault": "no", "metrics": {}}) if row.arm.endswith("seed1/ultraedit") else row
        for row in rows
    ]
    for kept, known in ((rows, True), (failed, False)):
        (table,) = tables_of(arms, kept, OUT)
        assert math.isnan(table.lines[1].differences["knowledge/new"].mean) != known


def test_free_answers_have_intervals_and_differences(write):
    _, lines = table(write())
    values = []
    for method in ("memit_seq", "single"):
        rows = map(json.loads, (OUT / f"runs/own/4/seed0/{method}/answers.jsonl").read_text().splitlines())
        answers = [(row["after"].lower(), row["expected"]) for row in rows if row["topic"] == "fact"]
        values.append(np.array([float(expected in answer.split()) for answer, expected in answers]))
        assert lines[method].metrics["learned"] == Interval.of(values[-1])
    assert lines["single"].differences["learned"] == Interval.of(values[1] - values[0], least=-1.0)


def test_nothing_is_compared_across_protocols_or_without_a_run(write):
    methods = {
        "memit_seq": {},
        "retrieval": {},
        "strict": {"method": "memit", "max_relative_update": 1e-9},
    }
    _, lines = table(write(methods=methods))
    assert lines["retrieval"].protocol != lines["memit_seq"].protocol
    assert not math.isnan(lines["retrieval"].metrics["efficacy"].mean)
    for method in ("retrieval", "strict"):
        assert all(math.isnan(each.mean) for each in lines[method].differences.values())
        assert lines[method].verdict == ""
    assert [fault.partition(":")[0] for fault in lines["strict"].faults] == ["NumericalError"]
    assert lines["strict"].protocol == ""
    assert math.isnan(lines["strict"].metrics["efficacy"].mean)


def answers_changed(folder, right):
    """Rewrite the free answers in a run folder's records, so that so many of them are right."""
    path = folder / "after.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for place, record in enumerate(records):
        for prompt in record["prompts"]:
            prompt["answered"] = float(place < right)
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def test_verdicts_say_what_is_beyond_the_interval(write):
    path = write(sizes=[8], metrics=["efficacy_answer"])
    arms = arms_of(read_suite(path))
    Rows(OUT).measure(arms)
    for method, right in {"memit_seq": 1, "ultraedit": 8, "single": 1}.items():
        answers_changed(OUT / "runs/own/8/seed0" / method, right)
    _, lines = table(path)
    assert lines["ultraedit"].verdict.startswith("better: efficacy_answer +87.5 [+")
    assert lines["single"].verdict == "no difference beyond the intervals"
    assert lines["memit_seq"].verdict == ""
    answers_changed(OUT / "runs/own/8/seed0/memit_seq", 8)
    answers_changed(OUT / "runs/own/8/seed0/ultraedit", 0)
    assert table(path)[1]["ultraedit"].verdict.startswith("worse: efficacy_answer")
