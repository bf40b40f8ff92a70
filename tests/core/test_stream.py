"""Facts that the model does not state behind a batch are edited again: its own, and those that it lost."""

import copy
import warnings
from dataclasses import dataclass, replace

import lightning as L
import pytest
import torch
from tiny_runs import LAYERS, editor_of, state

from cakeflow import EditRequest, GradientSearch, LeastSquares
from cakeflow.callbacks import PolicyGuard
from cakeflow.core.stream import earlier_requests
from cakeflow.core.walk import Walk
from cakeflow.errors import ConfigError, NotTakenWarning, NumericalError, PolicyError, RequestWarning, SharedKeyWarning
from cakeflow.evaluation.scoring import score_rows
from cakeflow.journal import Policy
from cakeflow.journal.steps import request_hash
from cakeflow.models import Site
from cakeflow.report import RunFolder
from cakeflow.solvers import Descent, FromScratch
from cakeflow.weighters import Weighter

SEARCH = GradientSearch(steps=40, lr=0.1, clamp=5.0, essence=None, decay=None)

pytestmark = [
    pytest.mark.filterwarnings("ignore::cakeflow.errors.NotTakenWarning"),
    pytest.mark.filterwarnings("ignore::cakeflow.errors.RequestWarning"),  # a batch may teach a fact of a later one
]


@pytest.fixture
def facts(learnable):
    return [replace(fact, probes=()) for fact in learnable]


def forgetful(lm, trainer=None, **changes):
    """An editor whose batches preserve nothing of those before, so that facts are lost."""
    width = lm.key_width(Site(0, "mlp_out"))
    moments = dict.fromkeys(LAYERS, torch.zeros(width, width, dtype=torch.float64))
    parts = {"targets": SEARCH, "moments": moments, "solver": LeastSquares(1.0), "history": False}
    return editor_of(lm, trainer, **{**parts, **changes})


def stated(editor, requests):
    """Whether the model states each request, by one pass of it alone."""
    texts = editor.module.encode(requests)
    return [bool(score_rows(editor.module.lm, [rows[0]])[1]) for rows in texts.rows]


def in_force(editor):
    return [step.hashes for step in editor.journal]


def test_a_stream_with_repairs_is_one_whose_lost_facts_were_edited_again_by_hand(sharp, facts):
    """In order, behind each batch, those of it too; the same bits."""
    hand, plain = copy.deepcopy(sharp), copy.deepcopy(sharp)
    editor = forgetful(sharp, repairs=1)
    editor.fit(facts, 4, evaluate=False)
    other = forgetful(hand)
    for start in range(0, len(facts), 4):
        other.fit(facts[start : start + 4], evaluate=False)
        so_far = facts[: start + 4]
        lost = [fact for fact, each in zip(so_far, stated(other, so_far), strict=True) if not each]
        if lost:
            other.fit(lost, evaluate=False)
    assert in_force(editor) == in_force(other)
    assert len(editor.journal) > 3
    assert state(sharp, editor.module) == state(hand, other.module)
    assert editor.journal.edits == other.journal.edits == len(facts)
    without = forgetful(plain)
    without.fit(facts, 4, evaluate=False)
    assert sum(stated(editor, facts)) > sum(stated(without, facts))


def test_facts_of_an_earlier_run_are_repaired_too(sharp, facts):
    editor = forgetful(sharp, repairs=2)
    editor.fit(facts[:6], evaluate=False)
    editor.fit(facts[6:], evaluate=False)
    early = {request_hash(fact) for fact in facts[:6]}
    assert any(early & set(hashes) for hashes in in_force(editor)[2:])
    assert editor.journal.edits == len(facts)


class StopBefore(L.Callback):
    """Stops a run between a batch and what is edited again behind it, or behind that."""

    def __init__(self, batches):
        self.batches = batches

    def on_train_batch_start(self, trainer, module, *_):
        if len(module.journal) >= self.batches:
            raise KeyboardInterrupt


@pytest.mark.parametrize("batches", [1, 3, 5])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(sharp, facts, tmp_path, batches):
    whole, first = copy.deepcopy(sharp), copy.deepcopy(sharp)
    expected = forgetful(whole, repairs=2)
    expected.fit(facts, 3, evaluate=False, run_dir=tmp_path / "whole")
    stopped = forgetful(first, {"callbacks": [StopBefore(batches)]}, repairs=2)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        stopped.fit(facts, 3, evaluate=False, run_dir=tmp_path / "run")
    editor = forgetful(sharp, repairs=2)
    editor.fit(facts, 3, evaluate=False, run_dir=tmp_path / "run")
    assert state(sharp, editor.module) == state(whole, expected.module)
    assert in_force(editor) == in_force(expected)
    editor.rollback()
    assert len(editor.journal) == 0


def test_facts_of_one_key_come_together_and_a_contradiction_is_left_to_the_later_one(sharp):
    """The key of a subject at the start of its prompt is the same whatever the prompt says behind it."""
    subject = {"fact_token": "subject_last", "probes": ()}
    first = EditRequest("{} lives in", "The Eiffel Tower", "Rome", **subject)
    other = EditRequest("{} is made of", "The Eiffel Tower", "the", **subject)
    newer = replace(first, target_new="Paris")
    editor = forgetful(sharp, repairs=1)
    editor.fit([first], evaluate=False)
    for fact in (other, newer):
        with pytest.warns(SharedKeyWarning):
            editor.fit([fact], evaluate=False)
    shared = [set(hashes) for hashes in in_force(editor) if len(hashes) > 1]
    assert all(hashes in ({request_hash(a), request_hash(other)} for a in (first, newer)) for hashes in shared)
    assert shared
    stream, journal = editor.module.stream, editor.journal
    lost = [stream.facts.requests[place] for place in stream.lost(sharp, journal, None)]
    assert first not in lost
    assert {*earlier_requests(journal, [newer])} == {first, other}


def test_a_repair_that_fails_leaves_the_batch(sharp, facts, monkeypatch):
    """The further batch is taken back whole, and named."""
    plain = copy.deepcopy(sharp)
    forgetful(plain).fit(facts[:6], evaluate=False)
    editor = forgetful(sharp, repairs=1, max_relative_update=10.0)
    edit = editor.module.edit

    def runs_away(batch, step):
        if len(editor.journal):
            editor.module.max_relative_update = 1e-9
        edit(batch, step)

    monkeypatch.setattr(editor.module, "edit", runs_away)
    with pytest.warns(NotTakenWarning, match="facts were not edited again: .*max_relative_update is 1e-09"):
        editor.fit(facts[:6], evaluate=False)
    assert len(editor.journal) == 1
    assert all(map(torch.equal, sharp.model.state_dict().values(), plain.model.state_dict().values()))


def test_repairs_are_no_further_facts_to_a_policy_and_on_the_page(sharp, facts, tmp_path):
    guard = {"callbacks": [PolicyGuard(Policy(max_edits=len(facts)))]}
    editor = forgetful(sharp, guard, repairs=1)
    editor.fit(facts, 4, evaluate=False, run_dir=tmp_path / "run")
    assert len(editor.journal) > 3
    run = RunFolder.read(tmp_path / "run")
    assert run.size == len(run.edits) == len(facts)
    assert [edit.subject for edit in run.edits] == [fact.subject for fact in facts]
    last = {name: step.number for step in editor.journal for name in step.hashes}
    assert [edit.batch for edit in run.edits] == [last[request_hash(fact)] for fact in facts]
    with pytest.raises(PolicyError, match="13 edits in a run, at most 12"):
        forgetful(copy.deepcopy(sharp), guard).fit([*facts, replace(facts[0], subject="Oslo")], 4, evaluate=False)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"repairs": -1}, "a whole number of at least 0, got -1"),
        ({"repairs": 1.5}, "a whole number of at least 0, got 1.5"),
        ({"repairs": 1, "solver": Descent()}, "0 for a solver without target values; got 1"),
    ],
)
def test_bad_repairs(lm, settings, words):
    with pytest.raises(ConfigError, match=f"repairs must be {words}"):
        editor_of(lm, **settings)


def test_a_batch_that_is_taken_back_names_the_facts_that_a_later_one_wrote_again(sharp, facts):
    editor = forgetful(sharp, repairs=1)
    editor.fit(facts, 4, evaluate=False)
    again = {name for step in editor.journal[1:] for name in step.hashes} & {*editor.journal[0].hashes}
    assert again
    with pytest.warns(RequestWarning, match="facts of what was taken back stay.* by name") as caught:
        editor.rollback(batch=0)
    texts = [fact.text for fact in facts if request_hash(fact) in again]
    assert sum(repr(text) in str(caught[0].message) for text in texts) == min(3, len(texts))
    assert editor.journal.edits == len(facts) - 4 + len(again)
    editor.rollback()  # nothing stays, so nothing is named


def test_a_repair_takes_no_place_of_a_coming_batch(sharp, facts):
    """A fact on record is lost behind the first batch, and comes again at the head of the second one."""
    editor = forgetful(sharp)
    editor.fit([facts[2], facts[4]], 1, evaluate=False)
    editor.module.repairs = 1
    editor.fit([facts[0], facts[1], facts[2], facts[3]], 2, evaluate=False)
    assert all(len(step.facts) == len(step.hashes) for step in editor.journal)
    assert {request_hash(facts[3])} <= {name for step in editor.journal for name in step.hashes}


def test_a_run_whose_repairs_fail_goes_on_where_it_stopped(sharp, facts, tmp_path):
    def make(lm, *callbacks):
        editor = forgetful(lm, {"callbacks": [*callbacks]}, repairs=1, solver=LeastSquares(1e-2))
        edit = editor.module.edit

        def repairs_fail(batch, step):
            if {request_hash(each) for each in batch.requests} & {
                name for each in editor.journal for name in each.hashes
            }:
                raise NumericalError("no")
            edit(batch, step)

        editor.module.edit = repairs_fail
        return editor

    whole = make(copy.deepcopy(sharp))
    whole.fit(facts[:4], 1, evaluate=False, run_dir=tmp_path / "whole")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        make(copy.deepcopy(sharp), StopBefore(3)).fit(facts[:4], 1, evaluate=False, run_dir=tmp_path / "run")
    editor = make(sharp)
    editor.fit(facts[:4], 1, evaluate=False, run_dir=tmp_path / "run")
    assert in_force(editor) == in_force(whole)
    assert state(sharp, editor.module) == state(whole.module.lm, whole.module)


@dataclass(frozen=True)
class OwnLayer(Weighter):
    """The first facts have the lowest layer, the others the highest one."""

    def weigh(self, lm, batch, layers):
        low = torch.tensor([number < 2 for number in batch.numbers])
        weights = torch.zeros(len(batch), len(layers), dtype=torch.float64)
        weights[low, 0] = weights[~low, -1] = 1.0
        return weights


def test_facts_of_a_lower_layer_alone_walk_again_to_the_value_site_of_all(sharp, facts, monkeypatch):
    monkeypatch.setattr(Walk, "not_taken", lambda _: [0, 1])
    editor = forgetful(sharp, weighter=OwnLayer(), rounds=1)
    editor.fit(facts[:4], evaluate=False)
    assert [fact.walks for fact in editor.journal[0].facts] == [2, 2, 1, 1]


def test_a_run_counts_the_facts_that_it_edited_though_earlier_ones_had_them(sharp, facts, tmp_path):
    editor, parts = editor_of(sharp, targets=SEARCH), (facts[:2], facts[:2], facts[1:3])
    runs = [editor.fit(part, 1, evaluate=False, run_dir=tmp_path / str(i)) for i, part in enumerate(parts)]
    assert [run.timed for run in runs] == [2, 2, 2]
    assert [RunFolder.read(tmp_path / str(i)).size for i in range(3)] == [2, 2, 2]
    assert editor.journal.edits == 3


def test_a_further_walk_of_the_first_batch_is_solved_from_scratch_too(sharp, facts):
    """The weight has this batch's own changes by then, and no earlier ones."""
    editor = editor_of(sharp, targets=replace(SEARCH, steps=3), solver=FromScratch(LeastSquares(1.0)), rounds=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="a further walk was taken back")
        editor.fit(facts[:4], evaluate=False)
    assert max(fact.walks for fact in editor.journal[0].facts) == 2
