"""What was done can be taken back bit for bit, in any type, at any time, and lands on disk in plain formats."""

import copy
from contextlib import suppress
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from safetensors.torch import load_file

from cakeflow import LayerProblem, Update
from cakeflow.data.request import EditRequest
from cakeflow.errors import ConfigError, NumericalError
from cakeflow.journal.journal import Journal
from cakeflow.journal.ledger import read_entries
from cakeflow.journal.store import JournalStore

FACTS = [EditRequest("{} plays", "Ann", "tennis")]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
RUN = {"model": "m", "settings": {}, "edits": 0, "batch_size": None, "data": ""}


def bits(lm):
    return {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}


def same(lm, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())


def draw(lm, layer, seed, scale=1.0, n=2):
    generator = torch.Generator().manual_seed(seed)
    d_out, d_in = lm.oriented(layer).shape
    left, right = (torch.randn(n, width, dtype=torch.float64, generator=generator) for width in (d_out, d_in))
    return Update(scale * right, left)


def apply(journal, step, layer, seed, scale=1.0):
    lm, update = journal.lm, draw(journal.lm, layer, seed, scale)
    problem = LayerProblem(
        update.right.clone(), update.left, lm.oriented(layer).double(), journal.origin(layer).double()
    )
    return journal.apply(step, layer, problem, update)


def edit(journal, requests, seed, layers=(1, 3), scale=1.0, last=None):
    with journal.batch(requests) as step:
        for layer in layers[:-1]:
            apply(journal, step, layer, seed + layer, scale)
        apply(journal, step, layers[-1], seed + layers[-1], last or scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rollback_of_everything_is_bit_identical(tiny, requests, dtype):
    tiny.model.to(dtype)
    before, journal = bits(tiny), Journal(tiny)
    for seed in range(4):
        edit(journal, requests[:2], 10 * seed, scale=0.1)
    assert not same(tiny, before)
    journal.rollback()
    assert same(tiny, before)
    assert len(journal) == len(journal.history(1)) == 0


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
    keys = [part.keys for step in journal for part in step.layers if part.layer == 3]
    assert len(journal.history(3)) == 2 * len(keys)
    assert not keys or torch.equal(journal.history(3).keys, torch.cat(keys))
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
    assert len(journal.history(1)) == 2
    edit(journal, requests[2:4], seed=3)
    journal.rollback(1)
    assert same(tiny, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_batch_that_fails_is_taken_back_whole(tiny, requests, dtype, error):
    tiny.model.to(dtype)
    journal = Journal(tiny)
    edit(journal, requests[:2], 0, scale=1e-3)
    before, rows = bits(tiny), {layer: journal.history(layer).keys.clone() for layer in (1, 3)}

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
    assert all(torch.equal(journal.history(layer).keys, rows[layer]) for layer in rows)
    assert len(journal.history(4)) == 0
    edit(journal, requests[2:4], 50, scale=1e-3)  # the next batch starts from the same float32 masters
    after = bits(tiny)
    journal.rollback()
    edit(journal, requests[:2], 0, scale=1e-3)
    edit(journal, requests[2:4], 50, scale=1e-3)
    assert same(tiny, after)


def test_a_pass_that_is_not_finite_touches_nothing(lm, requests):
    before, journal = bits(lm), Journal(lm)
    with pytest.raises(NumericalError, match="layer 3: the edited weight is not finite"):
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
    before, journal = tiny.oriented(2).double(), Journal(tiny)
    update = Update(torch.full((1, before.shape[1]), 2e-6, dtype=torch.float64), torch.ones(1, 48, dtype=torch.float64))
    for _ in range(200):
        with journal.batch(requests[:1]) as step:
            problem = LayerProblem(update.right, update.left, tiny.oriented(2).double(), journal.origin(2).double())
            journal.apply(step, 2, problem, update)
    wanted = (before + 200 * update.dense).to(dtype).double()
    one_by_one = tiny.oriented(2).double()
    assert float((one_by_one - wanted).norm()) < 0.01 * float((wanted - before).norm())
    alone = (before + update.dense).to(dtype).double()
    assert float((alone - before).norm()) < 0.1 * float((200 * update.dense).norm())


def test_the_change_is_the_sum_of_the_updates(tiny, requests):
    before, journal = tiny.oriented(3).clone(), Journal(tiny)
    for seed in range(3):
        edit(journal, requests[:1], seed, layers=(3,))
    total = sum(draw(tiny, 3, seed + 3).dense for seed in range(3))
    torch.testing.assert_close(tiny.oriented(3) - before, total, rtol=0, atol=1e-12)
    assert torch.equal(journal.origin(3), before)
    assert torch.equal(journal.origin(2), tiny.oriented(2))


def test_numbers_and_sequence(lm, requests):
    journal, weight = Journal(lm), lm.oriented(3).clone()
    with journal.batch(requests[:2]) as step:
        numbers = apply(journal, step, 3, 0)
    update = draw(lm, 3, 0)
    assert numbers["update"] == pytest.approx(float(update.dense.norm()))
    assert numbers["relative_update"] == pytest.approx(float(update.dense.norm() / weight.norm()), rel=1e-5)
    assert numbers["residual"] == pytest.approx(float(update.left.norm(dim=1).mean()))
    assert journal[0] is journal[-1] is step
    assert list(journal) == journal[:] == [step]
    assert step.requests == tuple(requests[:2])


def test_save_takes_updates_that_share_memory_with_the_keys(lm, requests, tmp_path):
    """A solver may well return the keys themselves as a factor."""
    journal, update, weight = Journal(lm), draw(lm, 3, 0), lm.oriented(3)
    with journal.batch(requests[:2]) as step:
        journal.apply(step, 3, LayerProblem(update.right, update.left, weight, weight), update)
    journal.save(tmp_path)
    tensors = load_file(tmp_path / "batch-00000.safetensors")
    assert torch.equal(tensors["3/keys"], tensors["3/right"])


def test_save_writes_plain_files(tiny, requests, tmp_path):
    original, journal = tiny.weight(3).detach().clone(), Journal(tiny)
    for seed in range(2):
        with journal.batch(requests[6 * seed : 6 * seed + 6]) as step:
            apply(journal, step, 3, seed)
            step.values[3] = torch.ones(6, 48)
            step.targets.append({"layer": 3, "loss": 0.5, "probability": 0.25, "steps": 2.0})
    with journal.batch(requests[:1]) as step:  # a change of full rank
        dense = torch.full(tiny.oriented(3).shape, 0.5, dtype=torch.float64)
        weight = tiny.oriented(3).double()
        problem = LayerProblem(torch.ones(1, dense.shape[1]), torch.ones(1, 48), weight, weight)
        journal.apply(step, 3, problem, Update(dense))
    journal.save(tmp_path)
    with pytest.raises(ConfigError, match="holds a journal already"):
        journal.save(tmp_path)
    told = [entry.body.to_dict() for entry in read_entries(tmp_path / "ledger.jsonl") if entry.kind == "batch"]
    assert [len(body["requests"]) for body in told] == [6, 6, 1]
    assert told[1]["requests"][2]["subject"] == "Frédéric Chopin"
    assert told[0]["targets"] == [{"layer": 3, "loss": 0.5, "probability": 0.25, "steps": 2.0}]
    assert set(told[0]["changes"][0]["numbers"]) == {"residual", "update", "relative_update"}
    assert torch.equal(load_file(tmp_path / "original-00003.safetensors")["3"], original)
    total = torch.zeros_like(dense)
    for number in range(3):
        tensors = load_file(tmp_path / f"batch-{number:05d}.safetensors")
        assert "3/keys" in tensors
        total += tensors["3/left"].T @ tensors["3/right"] if "3/left" in tensors else tensors["3/right"]
    assert torch.equal(load_file(tmp_path / "batch-00000.safetensors")["3/target"], torch.ones(6, 48))
    oriented = original if original.shape == total.shape else original.T
    torch.testing.assert_close(oriented + total, tiny.oriented(3), rtol=0, atol=1e-12)


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
                parts = [part.keys for step in journal for part in step.layers if part.layer == layer]
                keys = journal.history(layer).keys
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


class Life(RuleBasedStateMachine):
    """Batches come and go, fail, are saved, loaded, and survive the end of their process."""

    dtype = torch.float32
    model = None
    folders = None
    known: ClassVar[dict] = {}

    def __init__(self):
        super().__init__()
        self.begin(None)
        self.done = []

    def begin(self, folder):
        """A new process: the unedited model, and what is on disk."""
        self.lm = copy.deepcopy(self.model)
        self.journal = Journal(self.lm)
        if folder is None:
            self.folder = self.folders.mktemp("life") / "journal"
            self.journal.open(JournalStore(self.folder), RUN)
        else:
            self.journal.load(folder)

    @rule(seed=st.integers(0, 5), layers=st.sets(st.integers(0, 2), min_size=1))
    def edits(self, seed, layers):
        edit(self.journal, FACTS, seed, sorted(layers), 1e-2)
        self.done.append((self.journal[-1].number, seed, tuple(sorted(layers))))

    @rule(seed=st.integers(0, 5), layers=st.sets(st.integers(0, 2), min_size=1))
    def fails(self, seed, layers):
        with pytest.raises(NumericalError):
            edit(self.journal, FACTS, seed, [*sorted(layers), 3], 1e-2, last=float("nan"))

    @rule(count=st.integers(0, 3))
    def rolls_back(self, count):
        self.journal.rollback(count)
        del self.done[max(0, len(self.done) - count) :]

    @precondition(lambda self: self.done)
    @rule(data=st.data())
    def rolls_back_one(self, data):
        batch = data.draw(st.sampled_from(self.done))
        self.journal.rollback(batch=batch[0])
        self.done.remove(batch)

    @rule()
    def dies_and_is_loaded(self):
        self.begin(self.folder)

    @rule(torn=st.binary(max_size=30).filter(lambda data: b"\n" not in data))
    def dies_writing(self, torn):
        with (self.folder / "ledger.jsonl").open("ab") as file:
            file.write(torn)
        (self.folder / ".batch-00099.safetensors.1.tmp").write_bytes(torn)
        self.begin(self.folder)

    @rule()
    def moves(self):
        """Saved elsewhere, and gone on with there."""
        folder = self.folders.mktemp("life") / "moved"
        self.journal.save(folder)
        self.folder = folder
        self.begin(folder)

    @rule()
    def looks_back(self):
        with self.journal.reverted():
            assert same(self.lm, self.model.model.state_dict())

    @invariant()
    def is_as_if_only_what_is_left_had_been_done(self):
        plan = tuple(step[1:] for step in self.done)
        if plan not in self.known:
            journal = Journal(copy.deepcopy(self.model))
            for seed, layers in plan:
                edit(journal, FACTS, seed, layers, 1e-2)
            self.known[plan] = bits(journal.lm)
        assert same(self.lm, self.known[plan])
        assert [step.number for step in self.journal] == [step[0] for step in self.done]
        for layer in range(4):
            keys = [part.keys for step in self.journal for part in step.layers if part.layer == layer]
            found = self.journal.history(layer).keys
            assert found is None if not keys else torch.equal(found, torch.cat(keys))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_life_of_a_journal(lm, dtype, tmp_path_factory, requests):
    lm.model.to(dtype)
    parts = {"dtype": dtype, "model": lm, "folders": tmp_path_factory, "known": {}}
    machine = type("Life", (Life,), parts)
    run_state_machine_as_test(machine, settings=settings(max_examples=25, stateful_step_count=12, deadline=None))
