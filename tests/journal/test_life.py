"""The life of a journal: any sequence of edits, failures, rollbacks, saves, loads and crashes."""

import copy
from typing import ClassVar

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from cakeflow.errors import NumericalError
from cakeflow.journal.journal import Journal
from journal.edits import FACTS, RUN, bits, edit, history, keys_at, same


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
            self.journal.open(self.journal.store_at(self.folder), RUN)
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
        path = self.folder / "ledger.jsonl"
        whole = path.read_bytes().rpartition(b"\n")[0] + b"\n"
        path.write_bytes(whole + torn)
        (self.folder / ".ledger.jsonl.append").write_text(str(len(whole)))
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
            self.known[plan] = bits(journal.model)
        assert same(self.lm, self.known[plan])
        assert [step.number for step in self.journal] == [step[0] for step in self.done]
        for layer in range(4):
            keys = keys_at(self.journal, layer)
            result = history(self.journal, layer).keys
            assert result is None if not keys else torch.equal(result, torch.cat(keys))


@pytest.mark.filterwarnings("ignore:facts of what was taken back stay:cakeflow.errors.RequestWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_life_of_a_journal(lm, dtype, tmp_path_factory, requests):
    lm.model.to(dtype)
    parts = {"dtype": dtype, "model": lm, "folders": tmp_path_factory, "known": {}}
    machine = type("Life", (Life,), parts)
    run_state_machine_as_test(machine, settings=settings(max_examples=25, stateful_step_count=12, deadline=None))
