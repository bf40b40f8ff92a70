"""Whatever somebody else does to the model in memory is noticed before the journal builds on it, and stays as it is."""

import copy

import lightning as L
import pytest
import torch
from tiny_runs import editor_of, name_of
from torch import nn

from cakeflow.core.datamodule import EditDataModule
from cakeflow.errors import ConfigError, ModelChangedError
from cakeflow.journal.journal import Journal
from cakeflow.journal.ledger import read_entries
from journal.edits import DTYPES, bits, edit, same

HEAD = "lm_head.weight"


def change(lm, name=None, by=0.05):
    """Change a weight in a way that no version counter sees."""
    weight = lm.model.get_parameter(name or name_of(lm, 1))
    weight.data.add_(by)
    return weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("action", ["a batch", "a rollback"])
def test_an_edited_weight_that_changed_stops_what_comes_next(tiny, requests, dtype, action):
    tiny.model.to(dtype)
    journal = Journal(tiny)
    edit(journal, requests[:2], 0)
    weight = change(tiny)
    now = bits(tiny)
    with pytest.raises(ModelChangedError, match=rf"^{name_of(tiny, 1)}: changed .* Put back .* to a new Editor"):
        edit(journal, requests[:2], 1) if action == "a batch" else journal.rollback()
    assert same(tiny, now)
    assert len(journal) == 1
    weight.data.copy_(journal_content(journal, tiny, dtype))
    edit(journal, requests[:2], 1) if action == "a batch" else journal.rollback()


def journal_content(journal, tiny, dtype):
    """The weight as the first batch left it, made on a copy."""
    other = copy.deepcopy(tiny)
    other.masters.clear()
    other.weight(name_of(tiny, 1)).data.copy_(journal.original(name_of(tiny, 1))[name_of(tiny, 1)])
    for part in journal[0].changes:
        if part.place == name_of(tiny, 1):
            part.change.apply(other)
    return other.weight(name_of(tiny, 1)).to(dtype)


def test_a_weight_that_changes_within_a_batch_is_not_taken_for_its_base(lm, requests):
    journal = Journal(lm)
    edit(journal, requests[:2], 0)
    part = journal[0].changes[-1]
    now = lm.weight(part.place) + 0.05
    with pytest.raises(ModelChangedError, match=part.place), journal.batch(requests[:1]) as step:  # noqa: PT012
        change(lm, part.place)
        journal.apply(step, part.change, {})
    assert torch.equal(lm.weight(part.place), now)
    assert len(journal) == 1


OTHERS = {
    "the head": lambda lm: change(lm, HEAD),
    "another layer": lambda lm: change(lm, name_of(lm, 2)),
    "an edited layer": change,
    "a cast": lambda lm: lm.model.to(torch.bfloat16),
    "a new module": lambda lm: lm.model.add_module("extra", nn.Linear(2, 2)),
    "a module that went": lambda lm: lm.model.set_submodule("transformer.ln_f", nn.Identity()),
}


@pytest.mark.parametrize("somebody", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("action", ["fit", "rollback"])
def test_a_model_that_changed_between_two_fits(lm, requests, tmp_path, somebody, action):
    editor = editor_of(lm)
    editor.fit(requests[:2], evaluate=False, run_dir=tmp_path / "one")
    somebody(lm)
    now = bits(lm)
    with pytest.raises(ModelChangedError):
        editor.fit(requests[2:4], run_dir=tmp_path / "two") if action == "fit" else editor.rollback()
    assert same(lm, now)
    assert len(editor.journal) == 1
    assert not (tmp_path / "two").exists()


def test_a_new_editor_takes_the_changed_model_as_its_base(lm, requests):
    editor_of(lm).fit(requests[:2], evaluate=False)
    change(lm)
    now, editor = bits(lm), editor_of(lm)
    editor.fit(requests[2:4], evaluate=False)
    editor.rollback()
    assert same(lm, now)


@pytest.mark.parametrize("name", [None, HEAD])
def test_a_changed_model_is_not_exported_as_the_journals(lm, requests, tmp_path, name):
    editor = editor_of(lm)
    editor.fit(requests[:2], evaluate=False)
    change(lm, name)
    with pytest.raises(ModelChangedError, match=name or name_of(lm, 1)):
        editor.export(tmp_path / "out", "delta")
    assert not (tmp_path / "out").exists()


class Meddling(L.Callback):
    """Changes a weight after the first batch."""

    def __init__(self, name):
        self.name = name

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 0:
            change(pl_module.lm, self.name)


@pytest.mark.parametrize(("name", "batches"), [(None, 1), (HEAD, 2)])
def test_a_change_during_a_run_ends_it_unfinished(lm, requests, tmp_path, name, batches):
    editor = editor_of(lm, {"callbacks": [Meddling(name)]})
    with pytest.raises(ModelChangedError, match=name or name_of(lm, 1)):
        editor.fit(requests[:4], 2, evaluate=False, run_dir=tmp_path / "run")
    kinds = [entry.kind for entry in read_entries(tmp_path / "run" / "journal" / "ledger.jsonl")]
    assert kinds.count("batch") == len(editor.journal) == batches
    assert "end" not in kinds


@pytest.mark.parametrize("layers", [[1, 3], [2, 4]], ids=["the same layers", "other layers"])
def test_two_editors_of_one_model_take_back_in_turn(lm, requests, layers):
    before, one = bits(lm), editor_of(lm)
    moments = dict.fromkeys(layers, next(iter(one.module.covariances.values())).moment)
    one.fit(requests[:2], evaluate=False)
    between, two = bits(lm), editor_of(lm, layers=layers, moments=moments)
    two.fit(requests[2:4], evaluate=False)
    both = bits(lm)
    for action in (one.rollback, lambda: one.fit(requests[4:6])):
        with pytest.raises(ModelChangedError):
            action()
        assert same(lm, both)
    two.rollback()
    assert same(lm, between)
    one.rollback()
    assert same(lm, before)


def test_tied_weights_change_together(lm, requests):
    editor = editor_of(lm)  # which refuses weights that are tied already
    lm.module(name_of(lm, 2).removesuffix(".weight")).weight = lm.weight(name_of(lm, 1))
    before = bits(lm)
    editor.fit(requests[:2], evaluate=False)
    editor.fit(requests[2:4], evaluate=False)
    editor.rollback()
    assert same(lm, before)


# ---- the unedited model for a while ----


def test_nothing_is_edited_or_taken_back_inside_reverted(lm, requests, tmp_path):
    editor = editor_of(lm)
    editor.fit(requests[:2], evaluate=False, run_dir=tmp_path / "one")
    edited = bits(lm)
    actions = {
        "a batch": lambda: edit(editor.journal, requests[:2], 1),
        "a rollback": editor.rollback,
        "loading": lambda: editor.load(tmp_path / "one"),
    }
    with editor.reverted():
        unedited = bits(lm)
        for name, action in actions.items():
            with pytest.raises(ConfigError, match=f"^{name} inside reverted"):
                action()
        with pytest.raises((ConfigError, ModelChangedError)):
            editor.fit(requests[2:4], run_dir=tmp_path / "two")
        assert same(lm, unedited)
    assert same(lm, edited)
    assert not (tmp_path / "two").exists()
    editor.rollback()
    assert same(lm, unedited)


def test_a_change_inside_reverted_is_lost_aloud(lm, requests):
    journal = Journal(lm)
    edit(journal, requests[:2], 0)
    edited = bits(lm)
    with pytest.warns(UserWarning, match=rf"^{name_of(lm, 1)} changed inside reverted"), journal.reverted():
        change(lm)
    assert same(lm, edited)
    with journal.reverted(), journal.reverted():
        pass
    assert same(lm, edited)


def test_no_batch_or_rollback_inside_a_batch(lm, requests):
    journal = Journal(lm)
    edit(journal, requests[:2], 0)
    edited = bits(lm)
    for action in (journal.rollback, lambda: edit(journal, requests[:1], 1)):
        with pytest.raises(ConfigError, match="inside a batch"), journal.batch(requests[:2]):
            action()
    assert same(lm, edited)
    assert len(journal) == 1


# ---- modes around ----

MODES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize(("name", "mode"), MODES.items(), ids=MODES)
def test_a_mode_around_is_noticed(lm, requests, tmp_path, name, mode):
    before, editor = bits(lm), editor_of(lm)
    with mode(), pytest.raises(ConfigError, match=rf"^fit inside torch.{name}.*leave that block first"):
        editor.fit(requests[:2], run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with mode(), pytest.raises(ConfigError, match=f"^fit inside torch.{name}"):
        editor.trainer().fit(editor.module, datamodule=EditDataModule(requests[:2]))
    assert same(lm, before)
    editor.fit(requests[:2], evaluate=False, run_dir=tmp_path / "run")
    edited = bits(lm)
    with mode(), pytest.raises(ConfigError, match=f"^a rollback inside torch.{name}"):
        editor.rollback()
    fresh = copy.deepcopy(lm)
    with mode(), pytest.raises(ConfigError, match=f"^loading inside torch.{name}"):
        Journal(fresh).load(tmp_path / "run" / "journal")
    assert same(lm, edited)


def test_masters_of_a_batch_in_inference_mode_can_be_changed_later(lm, requests):
    lm.model.to(torch.bfloat16)
    journal, other = Journal(lm), Journal(copy.deepcopy(lm))
    with torch.inference_mode():
        edit(journal, requests[:2], 0)
    edit(other, requests[:2], 0)
    for each in (journal, other):
        edit(each, requests[:2], 1)
    assert same(lm, bits(other.model))
