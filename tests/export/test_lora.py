"""LoRA adapters of edits."""

import copy
import json
import os

import pytest
import torch
from cakeflow_restrain import Prune, Rect
from safetensors.torch import load_file
from tiny_runs import LAYERS, editor_of, name_of
from transformers import AutoModelForCausalLM

from cakeflow import EditRequest, LeastSquares
from cakeflow.errors import ExportError
from cakeflow.export import Manifest, apply_delta
from cakeflow.journal import WeightChange
from cakeflow.models import Site
from cakeflow.models.loading import load_model
from cakeflow.solvers import Descent, Update

from .conftest import logits

QUIET = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft uses it
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}


@QUIET
def test_an_adapter_loads_in_peft_and_agrees(case, ids, tmp_path):
    peft = pytest.importorskip("peft")
    base, editor = case
    editor.export(tmp_path / "out", "lora")
    plain = AutoModelForCausalLM.from_pretrained(base)
    unedited, expected = logits(plain, ids), logits(editor.model, ids)
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "out")
    off = (logits(adapted, ids) - expected).abs().max() / expected.abs().max()
    moved = (unedited - expected).abs().max() / expected.abs().max()
    assert off < TOLERANCE[expected.dtype] < moved
    assert all(
        tensor.dtype == torch.float32 for tensor in load_file(tmp_path / "out/adapter_model.safetensors").values()
    )
    assert Manifest.read(tmp_path / "out").fingerprint == load_model(base).fingerprint()


@QUIET
def test_an_adapter_of_more_facts_than_dimensions_is_as_small_as_it_can_be(lm, ids, tmp_path):
    """60 facts in 3 batches in a model that is 48 wide; and layers whose ranks differ."""
    peft = pytest.importorskip("peft")
    lm.model.float()
    base, editor = copy.deepcopy(lm), editor_of(lm)
    torch.manual_seed(0)
    for layers in ([1, 3], [1], [1]):
        with editor.journal.batch([EditRequest("{} is", f"a{n}", "b") for n in range(20)]) as step:
            for layer in layers:
                keys, residual = torch.randn(20, 192).double(), torch.randn(20, 48).double()
                problem = editor.module.problem(Site(layer, "mlp_out"), None, keys, residual, keys)
                change = WeightChange(name_of(lm, layer), LeastSquares(50.0).solve(problem), keys)
                editor.journal.apply(step, change, {})
    editor.export(tmp_path / "out", "lora")
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / "out/adapter_model.safetensors").items()}
    assert sorted(shapes.values()) == sorted([(48, 192), (48, 48), (20, 192), (48, 20)])
    expected = logits(lm.model, ids)
    adapted = peft.PeftModel.from_pretrained(base.model, tmp_path / "out")
    torch.testing.assert_close(logits(adapted, ids), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("solver", "words"),
    [
        (Rect(LeastSquares(0.5)), "batch 0 changed [^ ]*1.mlp"),
        (Prune(LeastSquares(0.5)), "batch 1, made when the run ended, changed [^ ]*1.mlp"),
        (Descent(steps=2), "batch 0 changed [^ ]*1.mlp"),
    ],
    ids=["rect", "prune", "ft"],
)
def test_full_rank_is_no_adapter_but_a_delta(lm, requests, tmp_path, solver, words):
    if isinstance(solver, Prune):  # weights so small that its restraint has something to hold back
        with torch.no_grad():
            [lm.weight(name_of(lm, layer)).mul_(1e-3) for layer in LAYERS]
    base, editor = copy.deepcopy(lm), editor_of(lm, {"logger": False}, solver=solver, max_relative_update=1e6)
    editor.fit(requests[:2], evaluate=False)
    with pytest.raises(ExportError, match=f"{words}.*RECT.*PRUNE.*delta"):
        editor.export(tmp_path / "out", "lora")
    assert list(tmp_path.iterdir()) == []
    editor.export(tmp_path / "out", "delta")
    apply_delta(base, tmp_path / "out")
    assert base.fingerprint() == lm.fingerprint()


@pytest.fixture
def wide(lm):
    """A tiny model with an edit of rank 12 in one layer and 3 in another, and the model before."""
    lm.model.float()
    base, editor = copy.deepcopy(lm), editor_of(lm)
    torch.manual_seed(0)
    with editor.journal.batch([EditRequest("{} is", "a", "b")]) as step:
        for layer, rank in zip(LAYERS, (12, 3), strict=True):
            update = Update(torch.randn(rank, 192).double() * 0.01, torch.randn(rank, 48).double() * 0.1)
            editor.journal.apply(step, WeightChange(name_of(lm, layer), update), {})
    return base, editor


def change_of(base, editor, layer):
    name = name_of(base, layer)
    return (editor.module.lm.oriented(name) - base.oriented(name)).double()


def adapter(path):
    tensors = load_file(path)
    return {
        name.removesuffix(".lora_A.weight")[17:]: tensors[name.replace("_A", "_B")].double() @ each.double()
        for name, each in tensors.items()
        if "lora_A" in name
    }


def test_a_rank_above_the_servers_is_refused_by_default(wide, tmp_path):
    _, editor = wide
    with pytest.raises(ExportError, match=r"rank 12, the server takes 8.*truncate"):
        editor.export(tmp_path / "out", "lora", max_rank=8)
    assert list(tmp_path.iterdir()) == []
    editor.export(tmp_path / "out", "lora", max_rank=16)
    details = Manifest.read(tmp_path / "out").details
    assert sorted(details["ranks"].values()) == [3, 12]
    assert details["max_lora_rank"] == 16


def test_a_truncated_adapter_states_the_error_that_it_has(wide, tmp_path):
    base, editor = wide
    editor.export(tmp_path / "out", "lora", max_rank=8, over_rank="truncate")
    products, details = adapter(tmp_path / "out/adapter_model.safetensors"), Manifest.read(tmp_path / "out").details
    for layer in LAYERS:
        path, change = name_of(base, layer).removesuffix(".weight"), change_of(base, editor, layer)
        values = torch.linalg.svdvals(change)
        best = float(values[8:].norm() / values.norm())  # Eckart and Young
        assert details["errors"][path] == pytest.approx(best, abs=1e-5)
        assert float((products[path] - change).norm() / change.norm()) == pytest.approx(best, abs=1e-5)
    assert details["errors"][name_of(base, LAYERS[0]).removesuffix(".weight")] > 0.1


def test_the_parts_of_a_split_adapter_add_up(wide, tmp_path):
    base, editor = wide
    editor.export(tmp_path / "out", "lora", max_rank=8, over_rank="split")
    parts = [adapter(path) for path in sorted((tmp_path / "out").rglob("adapter_model.safetensors"))]
    assert len(parts) == 2
    for layer in LAYERS:
        path, change = name_of(base, layer).removesuffix(".weight"), change_of(base, editor, layer)
        total = sum(part.get(path, torch.zeros(())) for part in parts)
        torch.testing.assert_close(total, change, rtol=0, atol=1e-5 * float(change.abs().max()))
    assert set(Manifest.read(tmp_path / "out").files) == {
        "adapter_model.safetensors",
        "part-2/adapter_model.safetensors",
    }


@QUIET
def test_peft_finds_the_base_by_itself(one, ids, tmp_path):
    peft = pytest.importorskip("peft")
    editor = one[1]
    editor.export(tmp_path / "out", "lora")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = logits(editor.model, ids)
    assert (logits(loaded, ids) - expected).abs().max() <= 1e-5 * expected.abs().max()
    editor.export(tmp_path / "named", "lora", base="someone/model")
    assert (
        json.loads((tmp_path / "named/adapter_config.json").read_text())["base_model_name_or_path"] == "someone/model"
    )
    with pytest.raises(ExportError, match="GGUF file"):
        editor.export(tmp_path / "none", "lora", base="a.gguf")


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_rights_are_those_of_the_umask(one, tmp_path, mask):
    before = os.umask(mask)
    try:
        for format in ("model", "delta", "lora"):
            one[1].export(tmp_path / f"{format}-{mask}", format)
            for path in (tmp_path / f"{format}-{mask}").iterdir():
                assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    finally:
        os.umask(before)
