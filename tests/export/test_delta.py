"""Deltas as factors, as entries and whole, and one of the real model; further forgeries are in ``test_formats``."""

import copy
import json
import re

import pytest
import torch
from cakeflow_restrain import Rect
from safetensors.torch import load_file, save_file
from tiny_runs import LAYERS, editor_of, name_of
from transformers import AutoModelForCausalLM

from cakeflow import Editor, LeastSquares, LocateThenEdit, Update
from cakeflow.data.schemas import parse_requests
from cakeflow.errors import ExportError
from cakeflow.export import Manifest, apply_delta
from cakeflow.export.card import escape
from cakeflow.journal import WeightChange
from cakeflow.models import Site
from cakeflow.models.loading import load_model
from cakeflow.storage.hashing import file_hash, tensor_hash

from .conftest import logits
from .forgery import sealed_text

FILE = "delta.safetensors"


def test_a_closed_form_is_factors_and_the_card_says_so(case, tmp_path):
    base, editor = case
    editor.export(tmp_path / "out", "delta")
    layouts = Manifest.read(tmp_path / "out").details["layouts"]
    names = [name_of(editor.module.lm, layer) for layer in LAYERS]
    assert sorted(layouts) == sorted(names)
    size = saved = 0
    for name, layout in layouts.items():
        weight = editor.model.get_parameter(name)
        assert (layout["layout"], layout["ranks"]) == ("factors", [2, 2])
        assert layout["bytes"] + layout["saved"] == weight.nbytes
        size, saved = size + layout["bytes"], saved + layout["saved"]
    assert saved > size
    assert (tmp_path / "out" / FILE).stat().st_size < size + 2000
    card = (tmp_path / "out/README.md").read_text()
    assert escape(f"2 as factors of rank 4; {size:,} bytes, {saved:,} fewer than the weights") in card
    fresh = load_model(base)
    apply_delta(fresh, tmp_path / "out")
    assert fresh.fingerprint() == editor.module.lm.fingerprint()


@pytest.mark.parametrize("keep", [0.2, 0.4])
def test_a_mask_is_entries(lm, requests, tmp_path, keep):
    lm.model.float()
    base = copy.deepcopy(lm)
    editor = editor_of(lm, {"logger": False}, solver=Rect(LeastSquares(0.5), keep=keep), max_relative_update=1e6)
    editor.fit(requests[:2], evaluate=False)
    editor.export(tmp_path / "out", "delta")
    for name, layout in Manifest.read(tmp_path / "out").details["layouts"].items():
        weight = lm.model.get_parameter(name)
        assert layout["layout"] == "sparse"
        assert layout["entries"] == int((weight != base.model.get_parameter(name)).sum()) < keep * weight.numel() + 2
        assert layout["bytes"] == 4 * layout["entries"] + weight.numel() // 8
    apply_delta(base, tmp_path / "out")
    assert base.fingerprint() == lm.fingerprint()


def test_a_delta_of_before_there_were_layouts_is_read(one, tmp_path):
    base, editor = one
    editor.export(tmp_path / "out", "delta", layout="dense")
    path = tmp_path / "out/manifest.json"
    stated = json.loads(path.read_text())
    assert {each["layout"] for each in stated.pop("details")["layouts"].values()} == {"dense"}
    path.write_text(sealed_text(stated))
    assert set(load_file(tmp_path / "out" / FILE)) == set(stated["weights"])
    fresh = load_model(base)
    apply_delta(fresh, tmp_path / "out")
    assert fresh.fingerprint() == editor.module.lm.fingerprint()


@pytest.fixture
def factors(one, tmp_path):
    """A delta of factors, its model, and a function that forges it: hashes fit, whoever made it."""
    base, editor = one
    folder, path = tmp_path / "out", tmp_path / "out/manifest.json"
    editor.export(folder, "delta")
    good, stated = load_file(folder / FILE), json.loads(path.read_text())

    def forge(tensors, **layout):
        save_file(tensors, folder / FILE)
        layouts = json.loads(json.dumps(stated["details"]["layouts"]))
        layouts[min(layouts)].update(layout)
        files = {FILE: file_hash(folder / FILE)}
        path.write_text(sealed_text(stated | {"files": files, "details": {"layouts": layouts}}))

    return folder, load_model(base), good, forge


def refused(lm, folder, words):
    before = {name: tensor_hash(tensor) for name, tensor in lm.model.state_dict().items()}
    with pytest.raises(ExportError, match=words):
        apply_delta(lm, folder)
    assert {name: tensor_hash(tensor) for name, tensor in lm.model.state_dict().items()} == before


def test_forged_factors_change_nothing(factors):
    folder, lm, good, forge = factors
    name = min(key.partition("/")[0] for key in good)
    left = good[f"{name}/left"]
    for number in (float("nan"), float("inf")):
        forge({**good, f"{name}/left": left.clone().index_fill_(0, torch.tensor(1), number)})
        refused(lm, folder, f"{re.escape(name)}/left': not finite")
    changes = {
        "where .* belong": {f"{name}/left": left[:, :-1].contiguous()},
        "other types": {f"{name}/left": left.half() if left.dtype == torch.float32 else left.float()},
        "not the weight": {f"{name}/left": left + 1},
        "name different weights": {"transformer.h.0.attn.c_attn.weight/left": left.clone()},
        "different weights: .*left'": {f"{name}/left/left": left.clone()},
        "it has .* belong": {f"{name}/more": left.clone()},
    }
    for words, change in changes.items():
        forge({**good, **change})
        refused(lm, folder, words)
    for layout, words in (
        ({"ranks": [4]}, "not the weight"),  # which is rounded after every change
        ({"ranks": [2, 3]}, "belong"),
        ({"ranks": []}, "with ranks"),
        ({"ranks": [0, 4]}, "greater than or equal to 1"),
        ({"ranks": [2**62]}, "less than"),
        ({"layout": "dense"}, "with ranks"),
        ({"layout": "magic"}, "layout"),
        ({"entries": 1}, "belong"),
        ({"entries": -1}, "greater than or equal to 0"),
        ({"bytes": 1}, "bytes"),
        ({"saved": -1}, "greater than or equal to 0"),
        ({"more": 1}, "more"),
    ):
        forge(good, **layout)
        refused(lm, folder, words)
    weight = lm.model.get_parameter(name)
    others = {key: each for key, each in good.items() if not key.startswith(name)}
    for numbers, words in (
        ([0, weight.numel()], "ascending numbers below"),
        ([-1, 3], "ascending numbers below"),
        ([3, 3], "ascending numbers below"),
        ([3, 2], "ascending numbers below"),
        ([2, 3, 4], "3 places for 2 entries"),
        ([2, 3], "not the weight that the manifest names"),
    ):
        places = torch.tensor(numbers, dtype=torch.int32)
        parts = {f"{name}/places": places, f"{name}/values": torch.ones(2)}
        size = sum(each.nbytes for each in parts.values())
        stated = {"layout": "sparse", "ranks": [], "entries": 2, "bytes": size, "saved": weight.nbytes - size}
        forge({**others, **parts}, **stated)
        refused(lm, folder, words)
    forge(good)
    apply_delta(lm, folder)


@pytest.mark.real
def test_the_embedded_model_can_be_saved_and_patched(smollm2, tmp_path):
    """It comes from a quantized file, which transformers would refuse to save."""
    fresh = copy.deepcopy(smollm2)
    editor = Editor(LocateThenEdit(smollm2, [9]))
    ids = torch.tensor([smollm2.tokenizer("The river Elbe flows into")["input_ids"]])
    before = logits(editor.model, ids)
    weight = smollm2.oriented(Site(9, "mlp_out"))
    change = Update(torch.ones(1, weight.shape[1], dtype=torch.float64), torch.ones(1, weight.shape[0]).double() / 100)
    try:
        with editor.journal.batch(parse_requests([{"prompt": "{} is", "subject": "It", "target_new": "so"}])) as step:
            edit = WeightChange(smollm2.weight_name(Site(9, "mlp_out")), change, change.right)
            editor.journal.apply(step, edit, {})
        editor.save_pretrained(tmp_path / "whole")
        editor.export(tmp_path / "delta", "delta")
        edited = logits(editor.model, ids)
        assert not torch.equal(edited, before)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole"), ids), edited)
        apply_delta(fresh, tmp_path / "delta")
        assert torch.equal(logits(fresh.model, ids), edited)
    finally:
        editor.rollback()
    assert torch.equal(logits(editor.model, ids), before)
