"""Keys of the facts in force, whatever came and went: in memory, and after a load from disk."""

import copy

import pytest
import torch
from tiny_runs import name_of

from cakeflow.errors import LedgerError
from cakeflow.journal.audit import verify
from cakeflow.journal.changes import WeightChange
from cakeflow.journal.journal import Journal
from cakeflow.journal.ledger import read_entries, requests_in_force
from cakeflow.journal.steps import facts_in_force, request_hash
from journal.edits import RUN, draw, history, same

LAYER = 1


def keys(journal, seed):
    return draw(journal.model, LAYER, seed).right


def values(journal, seed):
    return draw(journal.model, LAYER, seed + 50).left


def edit(journal, requests, seed, replaced=None, undone=(), of=-1):
    """Two facts with keys and values of their own, or two that are taken back."""
    with journal.batch(requests, undone, of) as step:
        step.replaced.update(replaced or {})
        own = (keys(journal, seed), values(journal, seed)) if requests else ()
        update = draw(journal.model, LAYER, seed, 1e-3)
        journal.apply(step, WeightChange(name_of(journal.model, LAYER), update, *own), {})
    return step


@pytest.fixture
def run(lm, requests, tmp_path):
    """Three batches; the second one's first fact replaced the first one's second fact."""
    journal = Journal(lm)
    journal.open(journal.store_at(tmp_path / "run/journal"), RUN)
    first = edit(journal, requests[:2], 0)
    edit(journal, requests[2:4], 10, {request_hash(requests[2]): [first.hashes[1]]})
    edit(journal, requests[4:6], 20)
    return journal


def require(journal, *facts):
    """The history has these facts, (seed of the batch, row), and each earlier state of the disk comes back the same."""
    expected = torch.stack([keys(journal, seed)[row] for seed, row in facts])
    assert torch.equal(history(journal, LAYER).keys, expected)
    assert torch.equal(history(journal, LAYER).values, torch.stack([values(journal, seed)[row] for seed, row in facts]))
    assert [journal.steps.index(step) for step, _ in facts_in_force(journal)] == [
        [step.number for step in journal].index(seed // 10) for seed, _ in facts
    ]
    assert journal.edits == len(facts)


def loaded(journal, folder):
    with journal.reverted():
        unedited = copy.deepcopy(journal.model)
    other = Journal(unedited)
    other.load(folder)
    return other


def test_what_a_batch_replaced_leaves_the_history_and_comes_back_with_its_rollback(run, tmp_path):
    rest = [(0, 0), (10, 0), (10, 1), (20, 0), (20, 1)]
    require(run, *rest)
    require(loaded(run, tmp_path / "run/journal"), *rest)
    run.rollback(batch=1)
    require(run, (0, 0), (0, 1), (20, 0), (20, 1))
    again = loaded(run, tmp_path / "run/journal")
    require(again, (0, 0), (0, 1), (20, 0), (20, 1))
    assert same(again.model, run.model.model.state_dict())
    assert verify(tmp_path / "run").faults == []


def test_it_comes_back_when_the_fact_that_replaced_it_is_taken_back_alone(run, requests, tmp_path):
    entries = tmp_path / "run/journal/ledger.jsonl"
    undone = run[1].hashes
    edit(run, (), 30, undone=[undone[1]], of=1)
    require(run, (0, 0), (10, 0), (20, 0), (20, 1))
    edit(run, (), 40, undone=[undone[0]], of=1)
    require(run, (0, 0), (0, 1), (20, 0), (20, 1))
    require(loaded(run, tmp_path / "run/journal"), (0, 0), (0, 1), (20, 0), (20, 1))
    subjects = [each["subject"] for each in requests_in_force(list(read_entries(entries)))]
    assert subjects == [request.subject for request in (*requests[:2], *requests[4:6])]
    run.rollback(1)
    require(run, (0, 0), (10, 0), (20, 0), (20, 1))
    assert [each["subject"] for each in requests_in_force(list(read_entries(entries)))] == [
        requests[i].subject for i in (0, 2, 4, 5)
    ]


@pytest.mark.filterwarnings("ignore:what a later batch")
def test_a_replacement_of_a_replacement_is_behind_the_first_one(run, requests):
    """Each names all that have its key, so that no order of rollbacks has two facts of one key in force."""
    old, new = run[0].hashes[1], run[1].hashes[0]
    edit(run, requests[6:8], 30, {request_hash(requests[6]): [old, new]})
    require(run, (0, 0), (10, 1), (20, 0), (20, 1), (30, 0), (30, 1))
    run.rollback(batch=1)
    require(run, (0, 0), (20, 0), (20, 1), (30, 0), (30, 1))
    run.rollback(1)
    require(run, (0, 0), (0, 1), (20, 0), (20, 1))


def test_a_batch_that_fails_replaces_nothing(run, requests):
    def fails():
        with run.batch(requests[6:8]) as step:
            step.replaced[step.hashes[0]] = [run[0].hashes[0]]
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    require(run, (0, 0), (10, 0), (10, 1), (20, 0), (20, 1))


def test_all_recorded_keys_are_there_to_compare_with(run):
    name = name_of(run.model, LAYER)
    everything = run.histories.recorded(name, run.steps)
    assert torch.equal(everything.keys, torch.cat([keys(run, seed) for seed in (0, 10, 20)]))
    assert everything.facts == [each for step in run for each in step.hashes]


@pytest.mark.filterwarnings("ignore:what a later batch")
def test_keys_that_were_read_again_stand_in_for_those_recorded_until_their_batches_are_gone(run):
    """Values and facts stay; what comes behind is as it was recorded."""
    name, other = name_of(run.model, LAYER), {0: keys(run, 70), 1: keys(run, 80)}
    before = history(run, LAYER)
    assert torch.equal(run.histories.of(other, name, run.steps).keys[:3], torch.cat([other[0][:1], other[1]]))
    run.histories.renew({name: other}, run.steps[:2], run.steps)
    after = history(run, LAYER)
    assert run.histories.is_renewed_behind(run.steps[:2])
    assert torch.equal(after.keys, torch.cat([other[0][:1], other[1], keys(run, 20)]))
    assert (after.facts, after.values.tolist()) == (before.facts, before.values.tolist())
    run.rollback(1)
    assert torch.equal(history(run, LAYER).keys, torch.cat([other[0][:1], other[1]]))
    run.rollback(batch=0)
    assert torch.equal(history(run, LAYER).keys, keys(run, 10))
    assert run.histories.is_renewed_behind([])


def test_a_ledger_whose_batch_replaces_by_a_fact_that_it_has_not_is_refused(lm, requests, tmp_path):
    journal = Journal(lm)
    journal.open(journal.store_at(tmp_path / "run"), RUN)
    edit(journal, requests[:2], 0, {"0" * 64: ["1" * 64]})
    journal.rollback()
    with pytest.raises(LedgerError, match="batch 0: 0000000000000000 replaced earlier facts and is none of the batch"):
        Journal(lm).load(tmp_path / "run")


def test_keys_follow_a_model_that_is_moved(run):
    kept = history(run, LAYER)
    run.histories.follow(run.steps)
    assert history(run, LAYER) is kept
    run.model.model.to("meta")
    run.histories.follow(run.steps)
    assert (history(run, LAYER).keys.device.type, history(run, LAYER).facts) == ("meta", kept.facts)


def test_a_float32_copy_that_is_with_its_weight_stays(lm):
    name = name_of(lm, LAYER)
    lm.masters[name] = master = torch.zeros_like(lm.weight(name))
    lm.follow()
    assert lm.masters[name] is master
