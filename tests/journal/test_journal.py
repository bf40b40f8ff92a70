"""What was done can be taken back bit for bit, in any type, at any time, and lands on disk in plain formats."""

import copy
import dataclasses
from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_runs import content, name_of

from cakeflow import Update
from cakeflow.errors import ConfigError, NumericalError
from cakeflow.journal.changes import WeightChange
from cakeflow.journal.journal import Journal
from cakeflow.journal.ledger import bodies, read_entries
from cakeflow.journal.schema import BatchBody, TargetBody
from cakeflow.models import Site
from journal.edits import DTYPES, apply, bits, draw, edit, history, keys_at, same


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rollback_of_everything_is_bit_identical(tiny, requests, dtype):
    tiny.model.to(dtype)
    before, journal = bits(tiny), Journal(tiny)
    for seed in range(4):
        edit(journal, requests[:2], 10 * seed, scale=0.1)
    assert not same(tiny, before)
    journal.rollback()
    assert same(tiny, before)
    assert len(journal) == len(history(journal, 1)) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("taken", [1, 2, 3])
def test_rollback_of_the_last_batches_equals_never_having_done_them(tiny, requests, dtype, taken):
    tiny.model.to(dtype)
    journal, snapshots = Journal(tiny), [bits(tiny)]
    for seed in range(3):
        edit(journal, requests[:2], 10 * seed, layers=(1, 3) if seed != 1 else (3, 4), scale=1e-3)
        snapshots.append(bits(tiny))
    journal.rollback(taken)
    assert same(tiny, snapshots[3 - taken])
    assert len(journal) == 3 - taken
    keys = keys_at(journal, 3)
    assert len(history(journal, 3)) == 2 * len(keys)
    assert not keys or torch.equal(history(journal, 3).keys, torch.cat(keys))
    for seed in range(3 - taken, 3):  # and doing them again gives the same bits
        edit(journal, requests[:2], 10 * seed, layers=(1, 3) if seed != 1 else (3, 4), scale=1e-3)
    assert same(tiny, snapshots[3])


@pytest.mark.parametrize("steps", [0, 99])
def test_rollback_of_none_or_more_than_there_are(lm, requests, steps):
    before, journal = bits(lm), Journal(lm)
    edit(journal, requests[:2], 0)
    edited = bits(lm)
    journal.rollback(steps)
    assert same(lm, edited if steps == 0 else before)
    assert len(journal) == (1 if steps == 0 else 0)


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        ({"steps": 1}, [0, 1, 2]),
        ({"steps": 2}, [0]),
        ({"steps": 3}, []),
        ({"batch": 0}, [1, 3]),
        ({"batch": 1}, [0, 3]),
        ({"batch": 3}, [0, 1, 2]),
        ({"batch": 2}, [0, 1, 3]),
        ({"batch": 4}, [0, 1, 2, 3]),
    ],
    ids=str,
)
def test_what_completed_a_run_goes_with_any_batch_that_it_counted_on(tiny, requests, arguments, left):
    """Steps 2 and 4 complete two runs, as PRUNE does; without them the weights are those of the batches alone."""
    plan = [requests[:2], requests[2:4], (), requests[4:6], ()]
    journal, alone = Journal(tiny), Journal(copy.deepcopy(tiny))
    for seed, facts in enumerate(plan):
        edit(journal, facts, 10 * seed, scale=1e-3)
    for seed in left:
        edit(alone, plan[seed], 10 * seed, scale=1e-3)
    journal.rollback(**arguments)
    assert [step.number for step in journal] == left
    assert same(tiny, bits(alone.model))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"steps": -1}, "at least 0, got -1"),
        ({"steps": 0.5}, r"got 0\.5"),
        ({"steps": "1"}, "got '1'"),
        ({"steps": True}, "got True"),
        ({"batch": 7}, "no single batch 7 to take back; there are 0"),
        ({"batch": -1}, "no single batch -1"),
        ({"batch": 0.0}, r"no single batch 0\.0"),
        ({"batch": "0"}, "no single batch '0'"),
        ({"batch": False}, "no single batch False"),
        ({"batch": 0, "steps": 1}, "give one of them"),
    ],
    ids=str,
)
def test_what_is_no_number_of_batches_is_refused(lm, requests, arguments, words):
    journal = Journal(lm)
    edit(journal, requests[:2], 0)
    edited = bits(lm)
    with pytest.raises(ConfigError, match=words):
        journal.rollback(**arguments)
    assert same(lm, edited)
    assert len(journal) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_a_rehearsal_leaves_nothing_in_model_folder_or_numbers(lm, requests, tmp_path, fails):
    journal = Journal(lm)
    journal.store = journal.store_at(tmp_path / "journal")
    journal.store.append(journal.base)
    edit(journal, requests[:2], 0)
    before, keys, files = bits(lm), history(journal, 1).keys, content(tmp_path)
    with suppress(ZeroDivisionError), journal.rehearsal():
        edit(journal, requests[2:4], 10)
        edit(journal, requests[4:6], 20, layers=(3, 4))
        assert not same(lm, before)
        if fails:
            raise ZeroDivisionError
    assert same(lm, before)
    assert torch.equal(history(journal, 1).keys, keys)
    assert content(tmp_path) == files
    edit(journal, requests[2:4], 10)
    assert [step.number for step in journal] == [0, 1]
    assert (tmp_path / "journal" / "batch-00001.safetensors").exists()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fails", [False, True])
def test_a_trial_leaves_nothing(tiny, requests, dtype, fails):
    tiny.model.to(dtype)
    journal = Journal(tiny)
    edit(journal, requests[:2], seed=0)
    before = bits(tiny)
    with suppress(KeyError), journal.trial() as step:
        apply(journal, step, 1, seed=5)
        assert not same(tiny, before)
        if fails:
            raise KeyError
    assert same(tiny, before)
    assert len(journal) == 1
    assert len(history(journal, 1)) == 2
    edit(journal, requests[2:4], seed=3)
    journal.rollback(1)
    assert same(tiny, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_batch_that_fails_is_taken_back_whole(tiny, requests, dtype, error):
    tiny.model.to(dtype)
    journal = Journal(tiny)
    edit(journal, requests[:2], 0, scale=1e-3)
    before, rows = bits(tiny), {layer: history(journal, layer).keys.clone() for layer in (1, 3)}

    def fail():
        with journal.batch(requests[2:4]) as step:
            apply(journal, step, 1, 77)
            apply(journal, step, 4, 78)
            assert not same(tiny, before)
            raise error

    with pytest.raises(error):
        fail()
    assert same(tiny, before)
    assert len(journal) == 1
    assert all(torch.equal(history(journal, layer).keys, rows[layer]) for layer in rows)
    assert len(history(journal, 4)) == 0
    edit(journal, requests[2:4], 50, scale=1e-3)  # the next batch starts from the same float32 masters
    after = bits(tiny)
    journal.rollback()
    edit(journal, requests[:2], 0, scale=1e-3)
    edit(journal, requests[2:4], 50, scale=1e-3)
    assert same(tiny, after)


def test_a_pass_that_is_not_finite_touches_nothing(lm, requests):
    before, journal = bits(lm), Journal(lm)
    with pytest.raises(NumericalError, match=r"3\..*weight: the edited weight is not finite"):
        edit(journal, requests[:2], 0, layers=(1, 3), last=float("inf"))
    assert same(lm, before)
    assert len(journal) == 0


def test_values_beyond_the_range_of_the_type_are_refused(lm, requests):
    """Finite in float64, infinite in the weights: what the model holds is what counts."""
    lm.model.to(torch.float16)
    before, journal = bits(lm), Journal(lm)
    with pytest.raises(NumericalError):
        edit(journal, requests[:2], 0, scale=1e6)
    assert same(lm, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_updates_add_up_in_half_precision(tiny, requests, dtype):
    """Each update alone is below half a unit in the last place of most weights."""
    tiny.model.to(dtype)
    before, journal = tiny.oriented(Site(2, "mlp_out")).double(), Journal(tiny)
    update = Update(torch.full((1, before.shape[1]), 2e-6, dtype=torch.float64), torch.ones(1, 48, dtype=torch.float64))
    for _ in range(200):
        with journal.batch(requests[:1]) as step:
            journal.apply(step, WeightChange(name_of(tiny, 2), update, update.right), {})
    expected = (before + 200 * update.dense).to(dtype).double()
    one_by_one = tiny.oriented(Site(2, "mlp_out")).double()
    assert float((one_by_one - expected).norm()) < 0.01 * float((expected - before).norm())
    alone = (before + update.dense).to(dtype).double()
    assert float((alone - before).norm()) < 0.1 * float((200 * update.dense).norm())


def test_the_change_is_the_sum_of_the_updates(tiny, requests):
    before, journal = tiny.oriented(Site(3, "mlp_out")).clone(), Journal(tiny)
    for seed in range(3):
        edit(journal, requests[:1], seed, layers=(3,))
    total = sum(draw(tiny, 3, seed + 3, n=1).dense for seed in range(3))
    torch.testing.assert_close(tiny.oriented(Site(3, "mlp_out")) - before, total, rtol=0, atol=1e-12)
    original = journal.original(name_of(tiny, 3))[name_of(tiny, 3)]
    assert torch.equal(tiny.oriented(name_of(tiny, 3), original), before)
    assert journal.original(name_of(tiny, 2)) == {}
    assert list(journal.state()) == [name_of(tiny, 3)]


def test_numbers_and_sequence(lm, requests):
    journal = Journal(lm)
    with journal.batch(requests[:2]) as step:
        apply(journal, step, 3, 0)
    assert step.changes[0].numbers == {"update": 1.0}
    assert journal[0] is journal[-1] is step
    assert list(journal) == journal[:] == [step]
    assert step.requests == tuple(requests[:2])
    assert journal.history(name_of(lm, 3)).facts == list(step.hashes)


def test_a_change_in_the_place_of_another(tiny, requests):
    """The batch is as if only the second one had been made; its hash is that of what is there."""
    journal, other = Journal(tiny), Journal(copy.deepcopy(tiny))
    for each in (journal, other):
        edit(each, requests[:2], 0, scale=1e-3)
    first, second = (draw(tiny, 3, seed, 1e-3) for seed in (5, 6))
    with journal.batch(requests[2:4]) as step:
        journal.apply(step, WeightChange(name_of(tiny, 3), first, first.right), {})
        journal.replace(step, 0, WeightChange(name_of(tiny, 3), second, first.right), {"update": 2.0})
    with other.batch(requests[2:4]) as alone:
        other.apply(alone, WeightChange(name_of(tiny, 3), second, first.right), {"update": 2.0})
    assert same(tiny, bits(other.model))
    assert (step.before, step.after, step.changes[0].numbers) == (alone.before, alone.after, alone.changes[0].numbers)
    journal.rollback(1)
    other.rollback(1)
    assert same(tiny, bits(other.model))


def test_places_inside_one_another_are_refused(lm, requests):
    journal, before = Journal(lm), bits(lm)
    edit(journal, requests[:2], 0, layers=(3,))
    edited = bits(lm)
    whole = dataclasses.replace(journal.changes[0], place=name_of(lm, 3).removesuffix(".weight"))

    def nest():
        with journal.batch(requests[2:4]) as step:
            journal.apply(step, whole, {})

    with pytest.raises(ConfigError, match=rf"{whole.place} cannot be edited: {name_of(lm, 3)} was"):
        nest()
    assert same(lm, edited)
    journal.rollback()
    assert same(lm, before)


def test_save_takes_updates_that_share_memory_with_the_keys(lm, requests, tmp_path):
    """A solver may well return the keys themselves as a factor."""
    journal, update = Journal(lm), draw(lm, 3, 0)
    with journal.batch(requests[:2]) as step:
        journal.apply(step, WeightChange(name_of(lm, 3), update, update.right), {})
    journal.save(tmp_path)
    tensors, stem = load_file(tmp_path / "batch-00000.safetensors"), f"0/{name_of(lm, 3)}"
    assert torch.equal(tensors[f"{stem}/keys"], tensors[f"{stem}/right"])


def test_save_writes_plain_files(tiny, requests, tmp_path):
    name, journal = name_of(tiny, 3), Journal(tiny)
    original = tiny.weight(name).detach().clone()
    for seed in range(2):
        with journal.batch(requests[6 * seed : 6 * seed + 6]) as step:
            apply(journal, step, 3, seed)
            step.values[3] = torch.ones(6, 48)
            step.targets.append(TargetBody(layer=3, loss=0.5, probability=0.6, steps=25.0))
    dense = torch.full(tiny.oriented(name).shape, 0.5, dtype=torch.float64)
    with journal.batch(requests[:1]) as step:  # a change of full rank
        journal.apply(step, WeightChange(name, Update(dense), torch.ones(1, dense.shape[1])), {})
    journal.save(tmp_path)
    with pytest.raises(ConfigError, match="holds a journal already"):
        journal.save(tmp_path)
    recorded = bodies(read_entries(tmp_path / "ledger.jsonl"), BatchBody)
    assert [len(body.requests) for body in recorded] == [6, 6, 1]
    assert recorded[1].requests[2]["subject"] == "Frédéric Chopin"
    assert recorded[0].targets == [TargetBody(layer=3, loss=0.5, probability=0.6, steps=25.0)]
    assert [(change.place, change.kind) for change in recorded[0].changes] == [(name, "WeightChange")]
    assert torch.equal(load_file(tmp_path / "original-00000-0.safetensors")[name], original)
    total = torch.zeros_like(dense)
    for number in range(3):
        tensors, stem = load_file(tmp_path / f"batch-{number:05d}.safetensors"), f"0/{name}"
        assert f"{stem}/keys" in tensors
        right = tensors[f"{stem}/right"]
        total += tensors[f"{stem}/left"].T @ right if f"{stem}/left" in tensors else right
    assert torch.equal(load_file(tmp_path / "batch-00000.safetensors")["target/3"], torch.ones(6, 48))
    torch.testing.assert_close(tiny.oriented(name, original) + total, tiny.oriented(name), rtol=0, atol=1e-12)


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("edit"), st.integers(0, 50), st.sets(st.integers(0, 5), min_size=1, max_size=3)),
        st.tuples(st.just("fail"), st.integers(0, 50), st.sets(st.integers(0, 5), min_size=1, max_size=3)),
        st.tuples(st.just("rollback"), st.integers(0, 3), st.none()),
    ),
    max_size=8,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS)
def test_any_sequence_leaves_the_state_of_the_committed_steps(lm, requests, dtype, actions):
    lm.model.to(dtype)
    journal, states = Journal(lm), [bits(lm)]
    try:
        for action, number, layers in actions:
            if action == "rollback":
                journal.rollback(number)
                del states[max(1, len(states) - number) :]
            elif action == "edit":
                edit(journal, requests[:1], number, sorted(layers), 1e-3)
                states.append(bits(lm))
            else:
                with pytest.raises(NumericalError):
                    edit(journal, requests[:1], number, [*sorted(layers), 0], 1e-3, last=float("nan"))
            assert same(lm, states[-1])
            assert len(journal) == len(states) - 1
            for layer in range(6):
                parts = keys_at(journal, layer)
                keys = history(journal, layer).keys
                assert keys is None if not parts else torch.equal(keys, torch.cat(parts))
    finally:
        journal.rollback()
        assert same(lm, states[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_reverted_for_a_while(tiny, dtype):
    """The unedited model inside, the edited one after, bit for bit, after an error too; edits then go on as if not."""
    tiny.model.to(dtype)
    before, journal = bits(tiny), Journal(tiny)
    with journal.reverted():
        assert same(tiny, before)
    with journal.batch(()) as step:
        apply(journal, step, 1, seed=0)
        apply(journal, step, 3, seed=1)
    edited = bits(tiny)
    with journal.reverted():
        assert same(tiny, before)
    assert same(tiny, edited)
    with suppress(RuntimeError), journal.reverted():
        raise RuntimeError
    assert same(tiny, edited)
    with journal.batch(()) as step:
        apply(journal, step, 1, seed=2)
    journal.rollback(1)
    assert same(tiny, edited)
    journal.rollback()
    assert same(tiny, before)
