"""Target values in two directions: SUIT's formula, a descent written out, and what a search has to keep."""

from dataclasses import replace

import pytest
import torch
from cakeflow_streams import SwapSearch
from cakeflow_streams.swap import swap
from hypothesis import given
from hypothesis import strategies as st

from cakeflow import Contexts
from cakeflow.errors import ConfigError, NumericalError
from cakeflow.forward import encode_batch
from cakeflow.models import Site, inject
from cakeflow.targets import LossBelow
from cakeflow.testing import TargetSearchContract, tiny_batch, tiny_model


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 4), st.integers(2, 9), st.integers(0, 99))
def test_the_change_by_the_formula_of_suit(n, width, seed):
    h, vectors = randn(n, width, seed=seed), 3 * randn(n, 2, width, seed=seed + 100)
    change, cosine = swap(h, vectors)
    for i in range(n):
        w1, w2 = (each / each.norm() for each in vectors[i])
        expected = (h[i] @ w2 - h[i] @ w1) * w1 + (h[i] @ w1 - h[i] @ w2) * w2
        torch.testing.assert_close(change[i], expected, rtol=0, atol=1e-12)
        assert float(cosine[i]) == pytest.approx(float(w1 @ w2), abs=1e-12)
        assert float(change[i].norm()) <= 4 * float(h[i].norm()) + 1e-12


@given(st.integers(2, 9), st.integers(0, 99))
def test_orthogonal_vectors_leave_the_norm_as_it_is(width, seed):
    h, vectors = randn(1, width, seed=seed), torch.linalg.qr(randn(width, 2, seed=seed + 1)).Q.T[None]
    assert float((h + swap(h, vectors)[0]).norm()) == pytest.approx(float(h.norm()), rel=1e-12)


def loss_of(lm, row, site, vectors, penalty):
    """The objective of one fact by a plain pass, differentiable in its vectors, and the change."""
    with torch.no_grad():
        h = lm.model.transformer.h[site.layer](_below(lm, row, site))[0]
    h = h.reshape(1, -1, h.shape[-1])[0, row.fact]
    w1, w2 = (each / each.norm() for each in vectors)
    change = (h @ w2 - h @ w1) * w1 + (h @ w1 - h @ w2) * w2
    with inject(lm, site, change[None], torch.tensor([row.fact])):
        logits = lm.model(input_ids=torch.tensor([row.ids[:-1]]), use_cache=False).logits[0, row.target - 1 :]
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(row.ids[row.target :]))
    return nll + penalty * (w1 @ w2) ** 2, change


def _below(lm, row, site):
    return lm.model(input_ids=torch.tensor([row.ids[:-1]]), use_cache=False, output_hidden_states=True).hidden_states[
        site.layer
    ]


@pytest.mark.parametrize("penalty", [0.0, 0.3, 5.0])
def test_a_search_is_the_descent_written_out(lm, requests, penalty):
    batch, site, steps = encode_batch(lm, requests[:1], Contexts()), Site(1), 4
    targets = SwapSearch(steps, 0.2, penalty, stop=LossBelow(0.0)).search(lm, batch, 1)
    start = torch.randn(2, lm.module(site).ln_1.weight.shape[0], generator=torch.Generator().manual_seed(0))
    vectors = start.double().requires_grad_()
    adam, losses = torch.optim.Adam([vectors], lr=0.2), []
    for step in range(steps):
        loss, change = loss_of(lm, batch.rows[0][0], site, vectors, penalty)
        losses.append(float(loss.detach()))
        if step < steps - 1:
            (vectors.grad,) = torch.autograd.grad(loss, vectors)
            adam.step()
    torch.testing.assert_close((targets.values - targets.initial)[0], change.detach(), rtol=1e-6, atol=1e-9)
    assert float(targets.loss) == pytest.approx(losses[-1], rel=1e-7)
    assert losses[-1] < losses[0]
    assert targets.steps.tolist() == [steps]


def test_the_penalty_keeps_the_vectors_apart():
    lm = tiny_model(torch.float64)
    norms = {}
    for penalty in (0.0, 100.0):
        targets = SwapSearch(30, 0.1, penalty, stop=LossBelow(0.0)).search(lm, tiny_batch(lm), 1)
        norms[penalty] = (targets.values.norm(dim=1) / targets.initial.norm(dim=1) - 1).abs().max()
    assert float(norms[100.0]) < 0.02 < float(norms[0.0])


def test_facts_are_done_one_by_one_and_stay_where_they_are():
    lm = tiny_model(torch.float64)
    search, batch = SwapSearch(40, 0.3, 0.0, stop=LossBelow(5.5686)), tiny_batch(lm)
    whole = search.search(lm, batch, 1)
    assert len(set(whole.steps.tolist())) == 3
    assert whole.converged.tolist() == [True, True, False]
    for place, count in enumerate(whole.steps.tolist()):
        alone = replace(search, steps=count).search(lm, batch.part([place]), 1)
        torch.testing.assert_close(alone.values[0], whole.values[place], rtol=1e-6, atol=1e-9)


def test_bad_settings_and_numbers():
    for bad in ({"steps": 0}, {"lr": -1.0}, {"max_tokens": 0}, {"penalty": -0.1}, {"penalty": float("nan")}):
        with pytest.raises(ConfigError, match=r"targets.*must be (above 0|0 or more), got"):
            SwapSearch(**bad)
    lm = tiny_model()
    batch = tiny_batch(lm)
    search = SwapSearch(steps=3, lr=float("inf"), stop=LossBelow(0.0))
    with pytest.raises(NumericalError, match=r"the loss of its target value at layer 1 is nan; lower targets.lr"):
        search.search(lm, batch, 1)


class TestSwapSearch(TargetSearchContract):
    search = SwapSearch(steps=4)
