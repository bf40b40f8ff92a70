"""What the page and the comparison are computed from."""

import json
import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
from bodies import body

from cakeflow.export.manifest import utc
from cakeflow.journal.ledger import Ledger, bodies, read_entries
from cakeflow.journal.schema import BatchBody
from cakeflow.report import RunFolder, render_page
from cakeflow.report.figures import curves_of
from cakeflow.report.intervals import Interval
from cakeflow.report.views import (
    edit_views,
    health,
    losses,
    method,
    peak_memory,
    relations,
    run_changes,
    seconds_per_edit,
)

from .conftest import write_ledger, write_lines
from .test_page import Page, words


@pytest.fixture
def run(run_folder):
    return RunFolder.read(run_folder)


def test_records_tell_metrics_with_intervals_and_the_log_tells_the_others(run):
    changes = run_changes(run)
    assert changes["efficacy"].after.mean != 0.875
    assert changes["efficacy"].before.high - changes["efficacy"].before.low > 0.2
    assert (changes["margin"].before.mean, changes["margin"].difference.mean) == (-2.5, 4.0)
    assert math.isnan(changes["margin"].after.low)


def test_the_difference_is_taken_record_by_record(run):
    pairs = [(old.prompts[0], new.prompts[0]) for old, new in zip(run.before, run.after, strict=True)]
    steps = [int(new.success) - int(old.success) for old, new in pairs if old.success is not None]
    result = run_changes(run)["efficacy"].difference
    assert result.mean == pytest.approx(statistics.fmean(steps))
    assert result == Interval.of(np.array(steps, dtype=float), least=-1.0)
    assert result.low < result.mean < result.high


def test_other_records_after_have_a_difference_without_interval(run):
    run.after.pop()
    result = run_changes(run)["efficacy"]
    assert result.difference.mean == pytest.approx(result.after.mean - result.before.mean)
    assert math.isnan(result.difference.low)


def test_relations_cover_every_record_once(run):
    result = relations(run)
    assert sum(relation.count for relation in result) == len(run.after)
    assert {relation.name for relation in result} == {"P103", "P19", "{} plays the sport of"}


def test_an_edit_has_its_record_and_its_entry_in_the_journal(run):
    view = edit_views(run)[5]
    assert (view.number, view.fact.subject, view.edit.subject) == (5, "Person 5", "Person 5")
    assert (view.tallies["rewrite"].before, view.tallies["rewrite"].after, view.tallies["rewrite"].total) == (0, 1, 1)
    assert "neighborhood" not in view.tallies
    assert [[part.prompt for part in pair] for pair in view.prompts["paraphrase"]] == [
        [f"Note {number}. {view.fact.subject} plays the sport of"] * 2 for number in (0, 1)
    ]
    ((prompt, old, new),) = view.texts
    assert prompt == "Person 5 is known for"
    assert old.startswith(" work that before")
    assert new.startswith(" work that after")


def test_edits_without_records_and_records_without_edits_are_both_shown(run):
    del run.before[3:], run.after[3:], run.edits[:2]
    views = edit_views(run)
    assert [view.number for view in views] == list(range(12))
    assert [view.edit is None for view in views] == [True, True] + [False] * 10
    assert views[-1].fact.subject == "Person 11"
    assert views[-1].tallies == {}


def test_the_same_fact_twice_takes_two_entries(run_folder):
    for name in ("before.jsonl", "after.jsonl"):
        path = run_folder / name
        path.write_text(path.read_text().replace("Person 3", "Person 0"))  # both of relation P103
    path = run_folder / "journal" / "ledger.jsonl"
    steps = [entry.body.to_dict() for entry in read_entries(path) if entry.kind == "batch"]
    steps[0]["requests"][3]["subject"] = "Person 0"
    write_ledger(path, steps)
    views = edit_views(RunFolder.read(run_folder))
    assert [views[place].edit.targets[0].loss for place in (0, 3)] == [0.5, 0.125]


def test_health_is_what_was_measured_last(run):
    row = {"health/state": 0.0, "health/edits": 4.0, "health/kl": 0.1, "health/layer5/growth": 1.2}
    last = {**row, "health/state": 1.0, "health/edits": 8.0, "health/layer7/growth": 1.6, "step": 3}
    assert health(run) is None
    got = health(replace(run, log=[row, last, {"step": 4.0}]))
    assert (got.state, got.edits) == ("wearing", 8)
    assert got.numbers == {"kl": 0.1, "growth": 1.6}
    assert health(replace(run, log=[{**row, "health/state": value} for value in (0.5, 9.0, math.nan)])) is None


def test_curves_losses_and_costs(run):
    curves = curves_of(run.log)
    assert set(curves) == {"ability acc", "neutral perplexity"}
    assert curves["ability acc"]["cloze"] == [(0, 0.5, 0.02), (4, 0.49, 0.02), (8, 0.48, 0.02)]
    assert [point[:2] for point in curves["neutral perplexity"]["perplexity"]] == [(0, 20), (4, 21), (8, 22)]
    assert math.isnan(curves["neutral perplexity"]["perplexity"][0][2])
    assert losses(run) == {9: [0.5 / number for number in range(1, 13)]}
    assert seconds_per_edit(run) == pytest.approx(24.5 / 12)
    assert peak_memory(run) == 2**29
    assert method(run) == "Scores + Jacobian + NullSpace(LeastSquares)"


def test_unknown_costs_are_nan(run_folder):
    info = json.loads((run_folder / "run.json").read_text())
    (run_folder / "run.json").write_text(json.dumps(info | {"timings": {"evaluation": 3.0}, "peaks": {"keys": None}}))
    run = RunFolder.read(run_folder)
    assert math.isnan(seconds_per_edit(run))
    assert math.isnan(peak_memory(run))


def test_metrics_that_are_null_are_left_out(run_folder):
    info = json.loads((run_folder / "run.json").read_text())
    metrics = {"before": {"margin": None, "fluency": None}, "after": {"margin": 1.5, "fluency": None}}
    (run_folder / "run.json").write_text(json.dumps(info | {"metrics": metrics}))
    changes = run_changes(RunFolder.read(run_folder))
    assert math.isnan(changes["margin"].before.mean)
    assert changes["margin"].after.mean == 1.5
    assert "fluency" not in changes
    assert "efficacy_answer" not in changes
    assert changes["generalization_tokens"].after.mean == 0.5


def test_free_answers_and_the_verdict_stand_on_top(run_folder):
    bare = Page(render_page(RunFolder.read(run_folder)))
    assert "Not asked:" in bare.texts["answers"]
    shared = {"topic": "fact", "prompt": "<i>Ann</i> lives in", "expected": "Rome", "request": 0}
    lines = [
        {**shared, "form": "completion", "before": "Oslo", "after": "Rome & more"},
        {**shared, "form": "chat", "before": "Oslo", "after": "Pisa"},
        {**shared, "topic": "neighbor", "form": "completion", "expected": "Lyon", "before": "Lyon", "after": "Kiel"},
    ]
    write_lines(run_folder / "answers.jsonl", lines)
    info = json.loads((run_folder / "run.json").read_text())
    (run_folder / "run.json").write_text(json.dumps({**info, "verdict": "1 of 1 facts <b>learned</b>"}))
    run = RunFolder.read(run_folder)
    page = Page(render_page(run))
    assert "1 of 1 facts <b>learned</b>." in page.header
    text = words(page.texts["answers"])
    assert "<i>Ann</i> lives inRomeOslo✓ Rome & moreOslo✗ Pisa" in text
    assert "Other answers that changed" in text
    assert "✗ Kiel" in text
    assert "learned_chat" in page.texts["metrics"]
    assert run_changes(run)["learned"].difference.mean == 1.0
    assert run_changes(run)["learned"].after.low < 0.5  # of one record nobody knows much


# ---- what was taken back or replaced, on the page ----


def test_a_rollback_stands_at_the_top_and_at_its_edits(run_folder):
    ledger = Ledger(run_folder / "journal" / "ledger.jsonl")
    ledger.append(body("evaluation"))
    entry = ledger.append(body("rollback", batches=[1], who="Bob@lab"))
    page = Page(render_page(RunFolder.read(run_folder)))
    head, edits = words(page.header), words(page.texts["edits"])
    assert f"Batch 1 taken back by Bob@lab on {utc(entry.time)}." in head
    assert "were measured before that" in head
    assert edits.count("Batch 1, taken back by Bob@lab on") == 4
    assert edits.count("Batch 0. Target") == edits.count("Batch 2. Target") == 4
    ledger.append(body("evaluation"))
    assert "were measured after that" in words(Page(render_page(RunFolder.read(run_folder))).header)


def test_a_fact_that_was_undone_stands_there_too(run_folder):
    ledger = Ledger(run_folder / "journal" / "ledger.jsonl")
    ledger.append(body("evaluation"))
    entry = ledger.append(body("batch", batch=3, undone=["0" * 64], undoes=1, who="Bob@lab"))
    head = words(Page(render_page(RunFolder.read(run_folder))).header)
    assert f"1 fact of batch 1 taken back by Bob@lab on {utc(entry.time)}." in head
    assert "were measured before that" in head


def test_a_fact_that_a_later_batch_replaced_is_marked_unless_that_one_was_taken_back(run_folder):
    path = run_folder / "journal" / "ledger.jsonl"
    steps = [
        each.model_dump(include={"batch", "requests", "targets"}) for each in bodies(read_entries(path), BatchBody)
    ]
    names = [[f"{step['batch']}{place}".rjust(64, "0") for place in range(4)] for step in steps]
    steps = [step | {"hashes": own} for step, own in zip(steps, names, strict=True)]
    write_ledger(path, [*steps[:2], steps[2] | {"replaced": {names[2][0]: [names[0][1]]}}])
    edits = words(Page(render_page(RunFolder.read(run_folder))).texts["edits"])
    assert edits.count("Batch 0, replaced by batch 2. Target") == 1
    assert [each.replaced for each in RunFolder.read(run_folder).edits] == [None, 2, *[None] * 10]
    Ledger(path).append(body("rollback", batches=[2]))
    assert [each.replaced for each in RunFolder.read(run_folder).edits] == [None] * 12
