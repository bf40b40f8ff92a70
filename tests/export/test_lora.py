"""LoRA adapters of edits."""

import copy

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
from cakeflow.solvers import Descent

from .conftest import logits

QUIET = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft uses it
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}


@QUIET
def test_an_adapter_loads_in_peft_and_agrees(case, ids, tmp_path):
    peft = pytest.importorskip("peft")
    base, editor = case
    editor.export(tmp_path / "out", "lora")
    plain = AutoModelForCausalLM.from_pretrained(base)
    unedited, wanted = logits(plain, ids), logits(editor.model, ids)
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "out")
    off = (logits(adapted, ids) - wanted).abs().max() / wanted.abs().max()
    moved = (unedited - wanted).abs().max() / wanted.abs().max()
    assert off < TOLERANCE[wanted.dtype] < moved
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
    wanted = logits(lm.model, ids)
    adapted = peft.PeftModel.from_pretrained(base.model, tmp_path / "out")
    torch.testing.assert_close(logits(adapted, ids), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


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
