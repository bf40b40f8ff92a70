"""Keys that were recorded and keys as they are."""

import pytest
import torch
from tiny_runs import LAYERS, editor_of, module_of, name_of

from cakeflow import Contexts
from cakeflow.callbacks import KeyDrift
from cakeflow.models import Site
from cakeflow.models.hooks import capture

CONTEXTS = Contexts((("{}",), ("I am. {}", "The sky is. {}")))


def plain_key(lm, request, layer):
    """The mean key of a fact, the bare prompt with half of the weight, by full passes."""
    keys = []
    for row in module_of(lm, contexts=CONTEXTS).encode([request]).rows[0]:
        with torch.no_grad(), capture(lm, [Site(layer, "mlp_out")], side="in") as inputs:
            lm.model(input_ids=torch.tensor([row.ids]), use_cache=False)
        keys.append(inputs[Site(layer, "mlp_out")][0, row.fact].double())
    return keys[0] / 2 + sum(keys[1:]) / 4


def test_drift_is_the_distance_of_the_keys_now_from_those_recorded(tiny, requests, tmp_path):
    watcher = KeyDrift(every=1)
    editor = editor_of(tiny, {"callbacks": [watcher]}, contexts=CONTEXTS, fact_token="subject_last")
    editor.fit(requests[:4], 2, evaluate=False, run_dir=tmp_path / "run")
    first, middle, last = watcher.rows
    assert first == {"keys/edits": 0}
    assert [middle["keys/edits"], last["keys/edits"]] == [2, 4]
    # nothing below the first layer changes, and the second one's keys are read when the first one is written
    assert max(middle["keys/layer1"], last["keys/layer1"], middle["keys/layer3"]) < 1e-6 < last["keys/layer3"]
    recorded = editor.journal.history(name_of(tiny, LAYERS[1])).keys
    now = torch.stack([plain_key(tiny, request, LAYERS[1]) for request in requests[:4]])
    drift = float(((now - recorded).norm(dim=1) / recorded.norm(dim=1)).mean())
    assert last["keys/layer3"] == pytest.approx(drift, rel=1e-6)
