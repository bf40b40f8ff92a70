"""Edited models beside their base models."""

import copy

import pytest
import torch
from tiny_runs import editor_of

from cakeflow.models.loading import load_model

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module")
def edited(_models, tmp_path_factory):
    """(architecture, type) -> folder of the base model, and an editor after a run of two batches in a run folder."""
    known = {}

    def find(arch, dtype, requests):
        if (arch, dtype) not in known:
            folder, lm = tmp_path_factory.mktemp("edited"), copy.deepcopy(_models[arch])
            lm.model.to(dtype).save_pretrained(folder / "base")
            lm.tokenizer.save_pretrained(folder / "base")
            editor = editor_of(load_model(folder / "base"))
            editor.fit(requests[:4], 2, run_dir=folder / "run")
            known[arch, dtype] = folder / "base", editor
        return known[arch, dtype]

    return find


@pytest.fixture(params=[(arch, dtype) for arch in ("gpt2", "llama") for dtype in DTYPES], ids=str)
def case(request, edited, requests):
    """Of both architectures in both types."""
    return edited(*request.param, requests)


@pytest.fixture
def one(edited, requests):
    """One of them."""
    return edited("gpt2", torch.float32, requests)


@pytest.fixture
def ids(_models, requests):
    return torch.tensor([_models["gpt2"].tokenizer(requests[0].text)["input_ids"]])


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits
