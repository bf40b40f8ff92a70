"""A delta on the real model; its refusals and forgeries are in ``test_export``."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from cakeflow import Editor, LocateThenEdit, Update
from cakeflow.data.schemas import parse_requests
from cakeflow.export import apply_delta
from cakeflow.journal import WeightChange
from cakeflow.models import Site


def logits(model, ids):
    return model(input_ids=ids).logits


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
