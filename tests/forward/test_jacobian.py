"""The chain against Jacobians of full forward passes."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from cakeflow import Contexts
from cakeflow.errors import ArchitectureError
from cakeflow.forward.jacobian import ModelJacobian
from cakeflow.forward.tokens import encode_batch
from cakeflow.models.architecture import Site

LAYERS, ANCHOR = [0, 1, 3], Site(3)


@pytest.fixture
def batch(tiny, requests):
    return encode_batch(tiny, requests[:4], Contexts.of(["{}", "I am. {}"]))


def first(output):
    return output[0] if isinstance(output, tuple) else output


def jacobian(lm, row, layer, anchor):
    """d anchor / d (block ``layer``'s output) at the subject's last token, from full passes."""
    ids, at = torch.tensor([row.ids]), row.subject
    place = torch.zeros(1, len(row.ids), 1, dtype=torch.float64)
    place[0, at] = 1

    def output(delta):
        def add(_module, _args, out):
            changed = first(out) + place * delta
            return (changed, *out[1:]) if isinstance(out, tuple) else changed

        seen = []
        handles = [
            lm.module(anchor if layer == anchor.layer else Site(layer)).register_forward_hook(add),
            lm.module(anchor).register_forward_hook(lambda _m, _a, out: seen.append(first(out)[0, at])),
        ]
        lm.model(input_ids=ids, use_cache=False)
        for handle in handles:
            handle.remove()
        return seen[0]

    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.jacobian(output, torch.zeros(48, dtype=torch.float64))


def bar(lm):
    """Transformers' RMSNorm and rotary embedding compute in float32, whatever the model's type."""
    return 1e-6 if hasattr(lm.model.config, "rms_norm_eps") else 1e-10


def vectors(n, seed):
    return torch.randn(n, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("anchor", [ANCHOR, Site(3, "mlp_out")], ids=str)
@pytest.mark.parametrize("max_tokens", [1, 1024])
def test_products_equal_those_with_dense_jacobians(tiny, batch, anchor, max_tokens):
    chain = ModelJacobian(tiny, batch, LAYERS, anchor, max_tokens)
    n = len(batch)
    dense = [torch.stack([jacobian(tiny, rows[0], layer, anchor) for rows in batch.rows]) for layer in LAYERS]
    assert float((dense[0] - torch.eye(48)).abs().max()) > 0.01
    torch.testing.assert_close(dense[-1], torch.eye(48).double().expand(n, -1, -1), rtol=0, atol=1e-12)
    covector = vectors(n, 0)
    for got, m in zip(chain.vjp(covector), dense, strict=True):
        torch.testing.assert_close(got, torch.einsum("nij,ni->nj", m, covector), rtol=0, atol=bar(tiny))
    tangents = [vectors(n, seed) for seed in (1, 2, 3)]
    expected = sum(torch.einsum("nij,nj->ni", m, t) for m, t in zip(dense, tangents, strict=True))
    torch.testing.assert_close(chain.jvp(tangents), expected, rtol=0, atol=bar(tiny))


def test_products_repeat_and_leave_the_model_alone(tiny, batch):
    before, chain = tiny.fingerprint(), ModelJacobian(tiny, batch, LAYERS, ANCHOR)
    one, other = (chain.jvp(chain.vjp(vectors(len(batch), 0))) for _ in range(2))
    assert torch.equal(one, other)
    assert tiny.fingerprint() == before
    assert not any(module._forward_hooks for module in tiny.model.modules())
    assert all(parameter.grad is None for parameter in tiny.model.parameters())


def test_nothing_is_computed_before_it_is_used(lm, requests):
    """The walk makes a chain for every turn; most allocators never touch it."""
    chain = ModelJacobian(lm, encode_batch(lm, requests[:2], Contexts()), LAYERS, ANCHOR)
    with torch.no_grad():
        lm.weight(Site(2, "mlp_out")).mul_(1.5)
    fresh, covector = ModelJacobian(lm, chain.batch, LAYERS, ANCHOR), vectors(2, 0)
    assert all(torch.equal(a, b) for a, b in zip(chain.vjp(covector), fresh.vjp(covector), strict=True))


def test_a_model_without_second_derivatives_says_so(lm, requests):
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return grad

    lm.module(Site(2, "mlp_out")).register_forward_hook(lambda _m, _a, out: Once.apply(out))
    chain = ModelJacobian(lm, encode_batch(lm, requests[:2], Contexts()), LAYERS, ANCHOR)
    with pytest.raises(ArchitectureError, match="forward-mode"):
        chain.vjp(vectors(2, 0))
