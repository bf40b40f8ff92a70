"""The loss of a changed weight and its gradient against plain passes, and fine-tuning on it."""

import pytest
import torch

from cakeflow import Contexts, Editor
from cakeflow.errors import ConfigError, NumericalError
from cakeflow.forward.loss import WeightLoss
from cakeflow.forward.tokens import encode_batch
from cakeflow.models import Site
from cakeflow.solvers import Descent
from cakeflow.testing import random_problems


def plain(lm, batch, layer, change):
    """One row at a time through the whole model, its weight changed in place."""
    weight = lm.weight(Site(layer, "mlp_out"))
    kept = weight.detach().clone()
    with torch.no_grad():
        weight += change if weight.shape == change.shape else change.T
        total = 0.0
        for variants in batch.rows:
            row = variants[0]
            logits = lm.model(input_ids=torch.tensor([row.ids[:-1]]), use_cache=False).logits[0]
            labels = torch.tensor(row.ids[row.target :])
            total += float(torch.nn.functional.cross_entropy(logits[row.target - 1 :].float(), labels)) / len(batch)
        weight.copy_(kept)
    return total


@pytest.mark.parametrize("max_tokens", [1, 4096])
@pytest.mark.parametrize("layer", [0, 3])
def test_equals_plain_passes(tiny, requests, layer, max_tokens):
    batch = encode_batch(tiny, requests[:4], Contexts())
    loss = WeightLoss(tiny, batch, Site(layer, "mlp_out"), max_tokens)
    gen, shape = torch.Generator().manual_seed(0), tiny.oriented(Site(layer, "mlp_out")).shape
    change, step = (0.05 * torch.randn(shape, generator=gen, dtype=torch.float64) for _ in range(2))
    value, gradient = loss(change)
    assert value == pytest.approx(plain(tiny, batch, layer, change), rel=1e-6)
    ahead, behind = (plain(tiny, batch, layer, change + sign * 0.02 * step) for sign in (1, -1))
    assert float((gradient * step).sum()) == pytest.approx((ahead - behind) / 0.04, rel=1e-2)


def test_the_model_is_left_as_it_was(tiny, requests):
    before = tiny.fingerprint()
    for parameter in tiny.model.parameters():
        parameter.requires_grad_(True)
    WeightLoss(tiny, encode_batch(tiny, requests[:2], Contexts()), Site(2, "mlp_out"))(
        torch.zeros_like(tiny.oriented(Site(2, "mlp_out")))
    )
    assert tiny.fingerprint() == before
    assert all(parameter.requires_grad and parameter.grad is None for parameter in tiny.model.parameters())


def test_fine_tuning_raises_the_targets_within_the_box(tiny, requests, quiet):
    before = {layer: tiny.oriented(Site(layer, "mlp_out")).clone() for layer in range(tiny.depth)}
    width = before[0].shape[1]
    editor = Editor.from_pretrained(
        tiny.model, "ft", tokenizer=tiny.tokenizer, layers=[1, 3, 4], contexts=Contexts(), trainer=quiet,
        solver={"class_path": "Descent", "init_args": {"lr": 0.01, "bound": 0.02}},
        moments=dict.fromkeys([1, 3, 4], torch.eye(width, dtype=torch.float64)),
    )  # fmt: skip
    loss = WeightLoss(tiny, encode_batch(tiny, requests[:3], Contexts()), Site(3, "mlp_out"))
    low = loss(torch.zeros_like(before[3]))[0]
    editor.fit(requests[:3], evaluate=False)
    assert loss(torch.zeros_like(before[3]))[0] < 0.9 * low
    change = tiny.oriented(Site(3, "mlp_out")) - before[3]
    assert 0.01 < float(change.abs().max()) <= 0.02 + 1e-6
    assert all(
        torch.equal(tiny.oriented(Site(layer, "mlp_out")), weight) for layer, weight in before.items() if layer != 3
    )
    assert editor.journal[-1].targets[0].steps == 1
    editor.rollback()
    assert torch.equal(tiny.oriented(Site(3, "mlp_out")), before[3])


def test_descent_against_adam_by_hand():
    """Minimise |D - A|^2 / 2 within a box."""
    (problem, *_) = random_problems()
    aim = torch.randn(problem.weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    asked = []

    def loss(change):
        asked.append(change.clone())
        return float((change - aim).square().sum() / 2), change - aim

    object.__setattr__(problem, "loss", loss)
    result = Descent(steps=400, lr=0.05, bound=0.5, stop_loss=0.0).solve(problem).dense
    torch.testing.assert_close(result, aim.clamp(-0.5, 0.5), rtol=0, atol=1e-3)
    assert torch.equal(asked[0], torch.zeros_like(aim))
    assert len(asked) == 400
    asked.clear()
    Descent(stop_loss=1e9).solve(problem)
    assert len(asked) == 1


@pytest.mark.parametrize("name", ["steps", "lr", "bound"])
def test_bad_settings(name):
    with pytest.raises(ConfigError, match=rf"Descent\.{name} must be above 0"):
        Descent(**{name: 0})


def test_what_cannot_be_descended():
    problem = next(random_problems())
    with pytest.raises(ConfigError, match="needs the model's loss"):
        Descent().solve(problem)
    object.__setattr__(problem, "loss", lambda change: (float("nan"), change))
    with pytest.raises(NumericalError, match="the loss is nan at step 0"):
        Descent().solve(problem)


@pytest.mark.parametrize("max_tokens", [1, 4096])
@pytest.mark.parametrize("layer", [0, 3])
def test_tokens_are_those_that_predict_targets_with_their_gradients(tiny, requests, layer, max_tokens):
    """One fact at a time, with the gradient by the projection's whole output."""
    batch, site = encode_batch(tiny, requests[:4], Contexts()), Site(layer, "mlp_out")
    keys, gradients = WeightLoss(tiny, batch, site, max_tokens).tokens()
    expected, reads = [], []

    def keep(_module, args, output):
        output.retain_grad()
        reads.append((args[0], output))

    handle = tiny.module(site).register_forward_hook(keep)
    for variants in batch.rows:
        row = variants[0]
        logits = tiny.model(input_ids=torch.tensor([row.ids[:-1]]), use_cache=False).logits[0, row.target - 1 :]
        torch.nn.functional.cross_entropy(logits, torch.tensor(row.ids[row.target :]), reduction="sum").backward()
        inputs, output = reads.pop()
        expected.append((inputs[0, row.target - 1 :], output.grad[0, row.target - 1 :]))
    handle.remove()
    torch.testing.assert_close(keys, torch.cat([key for key, _ in expected]).detach().double(), rtol=1e-9, atol=1e-11)
    by_output = torch.cat([gradient for _, gradient in expected]).double()
    torch.testing.assert_close(gradients, by_output, rtol=1e-9, atol=1e-11 * float(by_output.abs().max()))
