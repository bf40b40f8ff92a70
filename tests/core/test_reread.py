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
from cakeflow.journal.schema import RunBody
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
    editor = editor_of(tiny, reread_keys=every, **STRONG)
    editor.fit(requests[:4], 2, evaluate=False, run_dir=tmp_path / "run")
    watcher, module = KeyDrift(), editor.module
    stale = watcher.measure(module)["layer3"]
    assert stale > 1e-3
    with editor.reverted(), pytest.raises(ConfigError):  # the model is not the one to edit
        editor.fit(requests[4:6])
    module.phase = module_phase
    renew_keys(module)
    assert watcher.measure(module) == {"layer1": 0, "layer3": pytest.approx(stale if every == 0 else 0, abs=1e-12)}
