"""Keys of earlier facts that are read again: they are the model's own, and nothing depends on when they are read."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny_runs import LAYERS, StopAfter, editor_of, module_of, name_of, state

from cakeflow import Contexts, LeastSquares
from cakeflow.callbacks import KeyDrift
from cakeflow.core.callback import EditCallback
from cakeflow.core.reread import present_keys, renew_keys
from cakeflow.errors import ConfigError
from cakeflow.journal.ledger import bodies, read_entries
from cakeflow.journal.schema import BatchBody
from cakeflow.models import Site
from cakeflow.models.hooks import capture

STRONG = {"solver": LeastSquares(0.01), "fact_token": "subject_last"}


class Preserved(EditCallback):
    """Notes the keys that each solve preserves, and those that the model has before the batch."""

    def __init__(self):
        self.rows = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.now = plain_keys(module)

    def on_layer_solved(self, module, edit):
        history = edit.problem.history.keys
        self.rows.append((edit.context.site.layer, len(module.journal), history, self.now[edit.context.site.layer]))


def plain_keys(module):
    """Layer -> the keys of all facts so far, by full passes over the bare prompts."""
    keys = {layer: [] for layer in LAYERS}
    requests = [request for step in module.journal for request in step.requests]
    for rows in module.encode(requests).rows if requests else ():
        for layer, each in keys.items():
            with torch.no_grad(), capture(module.lm, [Site(layer, "mlp_out")], side="in") as inputs:
                module.lm.model(input_ids=torch.tensor([rows[0].ids]), use_cache=False)
            each.append(inputs[Site(layer, "mlp_out")][0, rows[0].fact].double())
    return {layer: torch.stack(each) if each else None for layer, each in keys.items()}


def distance(one, other):
    return float(((one - other).norm(dim=1) / other.norm(dim=1)).max())


def test_a_solve_preserves_the_keys_of_the_model_as_it_is(tiny, requests, tmp_path):
    """Every second batch; those of the batches behind it are as they were recorded."""
    watcher = Preserved()
    editor = editor_of(tiny, {"callbacks": [watcher]}, reread_keys=2, **STRONG)
    editor.fit(requests[:8], 2, evaluate=False, run_dir=tmp_path / "run")
    rows = {(layer, batch): (history, now) for layer, batch, history, now in watcher.rows}
    for layer in LAYERS:
        assert rows[layer, 0] == (None, None)
        assert distance(*rows[layer, 2]) < 1e-6
        assert torch.equal(rows[layer, 3][0][:4], rows[layer, 2][0])
    assert distance(*rows[LAYERS[1], 3]) > 1e-3


@pytest.mark.parametrize("every", [0, 2])
def test_drift_is_0_after_keys_were_read_again(tiny, requests, tmp_path, every):
    watcher = KeyDrift(every=None)
    editor = editor_of(tiny, {"callbacks": [watcher]}, reread_keys=every, **STRONG)
    editor.fit(requests[:4], 2, evaluate=False, run_dir=tmp_path / "run")
    stale = watcher.rows[-1]["keys/layer3"]
    assert stale > 1e-3
    renew_keys(editor.module)
    drift = watcher.measure(editor.module)
    assert drift["layer1"] < 1e-6
    assert drift["layer3"] == (stale if every == 0 else 0)


def batches_of(folder):
    """Hashes of the weights behind each batch."""
    bodies_of = bodies(list(read_entries(folder / "journal/ledger.jsonl")), BatchBody)
    return [[change.after for change in body.changes] for body in bodies_of]


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_run_that_was_interrupted_solves_with_the_same_bits(lm, requests, tmp_path, stop):
    """Between two readings, and right at one: the model is put back to where the keys were read."""
    once, again, other = lm, copy.deepcopy(lm), copy.deepcopy(lm)
    editor = editor_of(once, reread_keys=2, **STRONG)
    editor.fit(requests[:10], 2, evaluate=False, run_dir=tmp_path / "once")
    stopped = editor_of(again, {"callbacks": [StopAfter(stop)]}, reread_keys=2, **STRONG)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        stopped.fit(requests[:10], 2, evaluate=False, run_dir=tmp_path / "again")
    resumed = editor_of(other, reread_keys=2, **STRONG)
    resumed.fit(requests[:10], 2, evaluate=False, run_dir=tmp_path / "again")
    assert batches_of(tmp_path / "again") == batches_of(tmp_path / "once")
    assert state(other, resumed.module) == state(once, editor.module)


def test_after_a_rollback_and_after_a_load_the_next_batch_has_the_same_bits(lm, requests, tmp_path):
    """As if what was rolled back had never been, though keys had been read behind it."""
    plain, unedited = copy.deepcopy(lm), copy.deepcopy(lm)
    editor, never = editor_of(lm, reread_keys=2, **STRONG), editor_of(plain, reread_keys=2, **STRONG)
    editor.fit(requests[:10], 2, evaluate=False, run_dir=tmp_path / "run")
    editor.rollback(2)
    never.fit(requests[:6], 2, evaluate=False, run_dir=tmp_path / "never")
    loaded = editor_of(unedited, reread_keys=2, **STRONG)
    loaded.load(tmp_path / "run")
    for each in (editor, never, loaded):
        each.fit(requests[10:], 2, evaluate=False)
    assert state(plain, never.module) == state(lm, editor.module) == state(unedited, loaded.module)
    assert state(plain, never.module) != {}


def test_a_fact_that_was_replaced_or_taken_back_is_read_too_and_comes_back_with_its_key_of_now(lm, requests, tmp_path):
    editor = editor_of(lm, reread_keys=2, **STRONG)
    other = replace(requests[0], target_new="Lisbon")
    for number, facts in enumerate((requests[:2], [other], requests[2:3])):
        editor.fit(facts, evaluate=False, run_dir=tmp_path / str(number))
    journal, place = editor.journal, name_of(lm, LAYERS[1])
    first, second, third = (step.hashes for step in journal)
    assert journal.history(place).facts == [first[1], *second, *third]
    with journal.reverted(journal.steps[:2]):
        now = present_keys(editor.module, journal.steps)[place]
    assert torch.equal(journal.history(place).keys[:2], torch.cat([now[0][1:], now[1]]))
    editor.undo(requests[1].subject)
    renew_keys(editor.module)
    assert journal.history(place).facts == [*second, *third]
    assert torch.equal(
        journal.history(place).keys, torch.cat([present_keys(editor.module, journal.steps)[place][n] for n in (1, 2)])
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reread_keys": -1}, "reread_keys must be a whole number of at least 0, got -1"),
        ({"reread_keys": True}, "got True"),
        ({"reread_keys": 2.0}, r"got 2\.0"),
        ({"reread_keys": "2"}, "got '2'"),
        ({"reread_keys": 2, "history": False}, "reread_keys=2 reads the history's keys again: set history: true"),
    ],
    ids=str,
)
def test_bad_settings(lm, settings, words):
    with pytest.raises(ConfigError, match=words):
        module_of(lm, **settings)


def test_keys_that_cannot_be_read_again_are_named_before_anything_changes(lm, requests, tmp_path):
    """Without texts, or with contexts that make other keys."""
    unedited, chats = copy.deepcopy(lm), Contexts(chats=("Q: {} A:",))
    editor = editor_of(lm, record_texts=False, **STRONG)
    editor.fit(requests[:2], evaluate=False, run_dir=tmp_path / "run")
    other = editor_of(unedited, reread_keys=1, **STRONG)
    other.load(tmp_path / "run")
    before = unedited.fingerprint()
    with pytest.raises(ConfigError, match=r"the keys of batches 0 cannot be read again, because their texts were not"):
        other.fit(requests[2:3], evaluate=False, run_dir=tmp_path / "other")
    assert KeyDrift().measure(other.module) == {}
    further = editor_of(lm, contexts=chats, chat=True, reread_keys=1, **STRONG)
    with pytest.raises(ConfigError, match="the keys of batch 0 cannot be read again: its facts were written at other"):
        present_keys(further.module, editor.journal.steps)
    assert (unedited.fingerprint(), len(other.journal)) == (before, 1)
