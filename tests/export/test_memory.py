"""Modules that edits put in place leave a run and come back into the unedited model."""

import copy
import json

import pytest
import torch
from toy_changes import Scaled, Scaling

from cakeflow import EditRequest
from cakeflow.errors import EditError, ExportError, PolicyError
from cakeflow.export import apply_memory
from cakeflow.export.formats import export
from cakeflow.journal import Policy
from cakeflow.journal.journal import Journal

from .forgery import sealed_text

PLACE = "transformer.h.1.mlp"


@pytest.fixture
def scaled(lm):
    """The unedited model, and a journal over the model with two modules in place, one around the other."""
    base, journal = copy.deepcopy(lm), Journal(lm)
    for number in range(2):
        with journal.batch([EditRequest("{} is", f"Ann {number}", "here")]) as step:
            factor = torch.randn(lm.width, generator=torch.Generator().manual_seed(number)).to(lm.dtype)
            journal.apply(step, Scaled(PLACE, factor), {})
    return base, journal


@torch.no_grad()
def logits(lm):
    return lm(input_ids=torch.tensor([[5, 9, 3]])).logits


def test_a_memory_gives_the_same_logits(scaled, lm, tmp_path):
    base, journal = scaled
    before = logits(base)
    manifest = apply_memory(base, export(journal, tmp_path / "out", "memory"))
    assert [(change.place, change.kind) for change in manifest.changes] == [(PLACE, "Scaled")] * 2
    assert torch.equal(logits(base), logits(lm))
    assert not torch.equal(logits(base), before)


def test_a_memory_passes_a_policy(scaled, tmp_path):
    base, journal = scaled
    folder, before = export(journal, tmp_path / "out", "memory"), logits(base)
    with pytest.raises(PolicyError, match="without their texts"):
        apply_memory(base, folder, [Policy(denied_subjects=("x",))])
    assert torch.equal(logits(base), before)


def test_a_memory_is_for_one_model_only(scaled, lm, tmp_path):
    folder = export(scaled[1], tmp_path / "out", "memory")
    with pytest.raises(ExportError, match="edited already"):
        apply_memory(lm, folder)


def test_a_changed_memory_is_refused_and_leaves_the_model_alone(scaled, tmp_path):
    base, journal = scaled
    (file,) = (path for path in export(journal, tmp_path / "out", "memory").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    before = logits(base)
    with pytest.raises(ExportError, match=file.name):
        apply_memory(base, tmp_path / "out")
    assert torch.equal(logits(base), before)
    assert not any(isinstance(module, Scaling) for module in base.model.modules())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"place": ""}, "the whole model has no place"),
        ({"place": "transformer.h.9"}, "no module 'transformer.h.9'"),
        ({"kind": "WeightChange"}, "does not fit its manifest or this model .*right"),
    ],
)
def test_a_forged_memory_is_one_error_and_leaves_the_model_alone(scaled, tmp_path, damage, message):
    base, journal = scaled
    folder = export(journal, tmp_path / "out", "memory")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["changes"] = [{**each, **damage} for each in manifest["changes"]]
    (folder / "manifest.json").write_text(sealed_text(manifest))
    before, modules = logits(base), [*base.model.modules()]
    with pytest.raises(EditError, match=message):
        apply_memory(base, folder)
    assert torch.equal(logits(base), before)
    assert all(one is other for one, other in zip(base.model.modules(), modules, strict=True))


@pytest.mark.parametrize("format", ["model", "delta", "lora"])
def test_no_other_format_holds_modules(scaled, tmp_path, format):
    with pytest.raises(ExportError, match=f"{format}.*{PLACE}"):
        export(scaled[1], tmp_path / "out", format)
    assert not (tmp_path / "out").exists()
