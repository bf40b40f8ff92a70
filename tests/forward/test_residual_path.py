"""A change of the projection's output on its way to the block's output: factors, gates and norms."""

from dataclasses import replace

import pytest
import torch
from conftest import random_model
from torch import nn

from cakeflow import Contexts, EditRequest
from cakeflow.errors import ArchitectureError
from cakeflow.forward.keys import FactReader
from cakeflow.forward.residual_path import NormPath, ResidualPath, ResidualPaths, ScaledPath, measure_path
from cakeflow.forward.tokens import encode_batch
from cakeflow.models import Site
from cakeflow.models.hooks import capture, inject

SIZES = {
    "vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "head_dim": 8, "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip
FACTS = [EditRequest("Here comes {}", "Ann", "Rome"), EditRequest("A friend of {} is", "Bob", "sea")]
SITE = Site(1, "mlp_out")


def stream_of(lm):
    reader = FactReader(lm, encode_batch(lm, FACTS, Contexts()))
    reader.read(SITE, Site(1))
    return reader.prompts


def model_of(family, lm, **config):
    other = random_model(family, lm.tokenizer, **{**SIZES, **config})
    other.model.double()
    for name, parameter in other.model.named_parameters():
        if "norm" in name:  # a fresh norm has a weight of ones, which hides its part
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    return other


@torch.no_grad()
def changes_of_block(lm, delta):
    """The changes of the block's output by vectors added to the projection's, from full passes, one fact at a time."""
    changes = []
    for row, vector in zip(encode_batch(lm, FACTS, Contexts()).rows, delta, strict=True):
        ids, at = torch.tensor([row[0].ids[: row[0].subject + 1]]), torch.tensor([row[0].subject])
        outputs = []
        for part in (0 * vector, vector):
            with inject(lm, SITE, part[None], at), capture(lm, [Site(1)]) as values:
                lm(input_ids=ids)
            outputs.append(values[Site(1)][0, -1])
        changes.append(outputs[1] - outputs[0])
    return torch.stack(changes)


PATHS = {
    "llama": ({}, ResidualPath), "granite": ({"residual_multiplier": 0.22}, ScaledPath), "gemma2": ({}, NormPath),
    "olmo2": ({}, NormPath),
}  # fmt: skip


@pytest.mark.parametrize("family", PATHS)
def test_reached_is_what_a_full_pass_gives_and_required_is_its_inverse(family, lm):
    config, kind = PATHS[family]
    lm = model_of(family, lm, **config)
    path = measure_path(stream_of(lm), SITE)
    assert type(path) is kind
    delta = torch.randn(2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    change = changes_of_block(lm, delta)
    torch.testing.assert_close(path.reached(delta), change, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(changes_of_block(lm, path.required(change)), change, rtol=1e-3, atol=1e-5)


class Behind(nn.Module):
    """A module whose output passes another function."""

    def __init__(self, inner, function):
        super().__init__()
        self.inner, self.function = inner, function

    def forward(self, x):
        return self.function(self.inner(x))


def test_a_gate_is_measured_for_every_coordinate(lm):
    gate = torch.linspace(-1.0, 2.0, lm.width, dtype=torch.float64)
    gate[5] = 0.0
    mlp = lm.module("transformer.h.1.mlp")
    lm.module("transformer.h.1").mlp = Behind(mlp, lambda x: gate * x)
    lm = replace(lm, architecture=replace(lm.architecture, mlp_out="transformer.h.{}.mlp.inner.c_proj"))
    path = measure_path(stream_of(lm), SITE)
    torch.testing.assert_close(path.gate, gate.expand(2, -1), rtol=1e-9, atol=1e-9)
    change = torch.ones(2, lm.width, dtype=torch.float64)
    required = path.required(change)
    assert bool((required[:, 5] == 0).all())  # nothing can be written there
    torch.testing.assert_close(path.reached(required)[:, 6:], change[:, 6:])


def test_any_other_way_is_refused(lm):
    mlp = lm.module("transformer.h.1.mlp")
    lm.module("transformer.h.1").mlp = Behind(mlp, torch.tanh)
    lm = replace(lm, architecture=replace(lm.architecture, mlp_out="transformer.h.{}.mlp.inner.c_proj"))
    with pytest.raises(ArchitectureError, match=r"inner\.c_proj of GPT2LMHeadModel .* targets\.site: mlp_out"):
        measure_path(stream_of(lm), SITE)


def test_a_direct_path_is_measured_once_and_changes_nothing(tiny, monkeypatch):
    paths, stream = ResidualPaths(tiny), stream_of(tiny)
    change = torch.ones(2, tiny.width)
    assert paths.at(stream, SITE).required(change) is change
    monkeypatch.setattr(type(stream), "probe", None)  # any further measurement would fail
    assert paths.at(stream, SITE).reached(change) is change
    assert type(paths.ahead(FactReader(tiny, encode_batch(tiny, FACTS, Contexts())).prompts, SITE)) is ResidualPath


@pytest.mark.parametrize("centred", [True, False])
def test_a_norm_is_inverted_exactly(centred, lm):
    norm = (nn.LayerNorm if centred else nn.RMSNorm)(16, eps=0.0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.uniform_(-1.5, 1.5, generator=generator)
        entering, changed = (torch.randn(3, 16, dtype=torch.float64, generator=generator) for _ in range(2))
        path = NormPath(entering, norm, entering, norm(entering), 0.5, 3.0)
        change = 3.0 * (norm(changed) - norm(entering))
        required = path.required(change)
        torch.testing.assert_close(path.reached(required), change)
        scale = (entering + 0.5 * required).std(1, correction=0) if centred else (entering + 0.5 * required).norm(dim=1)
        torch.testing.assert_close(scale, entering.std(1, correction=0) if centred else entering.norm(dim=1))
