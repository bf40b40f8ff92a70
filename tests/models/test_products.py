"""Matrix products by oneDNN: torch's own numbers and derivatives, a model left as it was; attention without cuDNN."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cakeflow.models import base, products

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this build of torch has no oneDNN"
)


@pytest.fixture(autouse=True)
def _anywhere(monkeypatch):
    """The kernel gives the same on every processor, so it is tested on every one."""
    monkeypatch.setattr(products, "has_fast_products", lambda: True)


@pytest.fixture
def calls(monkeypatch):
    """Shapes of the inputs that went through the kernel."""
    shapes, kernel = [], products.product
    monkeypatch.setattr(products, "product", lambda x, weight: (shapes.append(tuple(x.shape)), kernel(x, weight))[1])
    return shapes


def pair(kind, bias=True):
    """A map of 24 inputs and 40 outputs in float32, and the same in float64."""
    torch.manual_seed(0)
    single = Conv1D(40, 24) if kind is Conv1D else nn.Linear(24, 40, bias=bias)
    if kind is Conv1D:
        nn.init.normal_(single.bias)
    single.requires_grad_(False)
    return single, copy.deepcopy(single).double()


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_outputs_and_both_derivatives_are_those_of_a_linear_map(kind, calls):
    single, double = pair(kind)
    model = nn.Sequential(single)
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1))
    results = []
    for module, inputs in ((model, x), (double, x.double())):
        leaf = inputs.requires_grad_()
        with products.fast_products(model):
            output = module(leaf)
        (first,) = torch.autograd.grad(output.pow(3).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), leaf)
        results.append((output.detach(), first.detach(), second))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() < 1e-6 * theirs.norm()
    assert calls[0] == (3, 5, 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gram_matrix_has_the_outer_products_of_its_rows(dtype, calls):
    rows = torch.randn(7, 25, generator=torch.Generator().manual_seed(0), dtype=dtype)
    expected = rows.double().T @ rows.double()
    for parts in (1, 6, 40):
        ours = products.gram(rows, parts)
        assert torch.equal(ours, ours.T)
        assert (ours - expected).norm() <= 10 * torch.finfo(dtype).eps * expected.norm()
    assert bool(calls) is (dtype == torch.float32)


def test_what_the_kernel_does_not_serve_goes_its_own_way(calls):
    single, double = pair(nn.Linear)
    trained = nn.Linear(24, 40)
    model, x = nn.ModuleList([single, double, trained]), torch.ones(16, 24)
    with products.fast_products(model):
        assert single(x[:4]).equal(nn.functional.linear(x[:4], single.weight, single.bias))  # few rows
        assert double(x.double()).dtype == torch.float64
        trained(x).sum().backward()
        with torch.autocast("cpu", torch.bfloat16):
            assert single(x).dtype == torch.bfloat16
        assert calls == []
        with torch.no_grad():
            trained(x)
    assert calls == [(16, 24)]
    assert trained.weight.grad is not None


def test_the_model_is_left_as_it_was_after_an_error_too():
    single, _ = pair(nn.Linear, bias=False)
    own = nn.Linear(24, 40)
    own.forward = lambda x: x
    model = nn.ModuleList([single, own])
    with pytest.raises(RuntimeError, match="shapes"), products.fast_products(model), products.fast_products(model):
        single(own(torch.ones(4, 23)))
    assert "forward" not in single.__dict__
    assert own(torch.ones(16, 24)).shape == (16, 24)


def test_a_copy_that_is_made_meanwhile_has_its_own_weights():
    single, _ = pair(nn.Linear, bias=False)
    with products.fast_products(nn.Sequential(single)):
        other = copy.deepcopy(single)
    other.weight.zero_()
    assert not other(torch.ones(16, 24)).any()
    assert single(torch.ones(16, 24)).any()


@pytest.mark.parametrize(("vendor", "expected"), [("GenuineIntel", False), ("AuthenticAMD", True)])
def test_who_gets_it(vendor, expected, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(products, "_processor", lambda: f"vendor_id : {vendor}")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products.has_fast_products.__wrapped__() is expected


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize(("device", "inside"), [("cuda", False), ("cpu", True)])
def test_attention_goes_without_cudnn_on_a_gpu(device, inside, enabled):
    state = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(enabled)
    with products.without_cudnn_attention(torch.device(device)):
        seen = torch.backends.cuda.cudnn_sdp_enabled()
    after = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(state)
    assert (seen, after) == (inside and enabled, enabled)


def test_a_model_runs_without_cudnn_attention(lm, monkeypatch):
    devices = []
    monkeypatch.setattr(base, "without_cudnn_attention", lambda device: devices.append(device) or nullcontext())
    lm(input_ids=torch.ones(1, 2, dtype=torch.long))
    assert devices == [lm.device]
