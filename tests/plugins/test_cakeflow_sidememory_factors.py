"""Training of factors: exact against the plain way over whole rows and all blocks."""

import pytest
import torch
from cakeflow_sidememory.factors import FactorLoss, Factors, FactorTraining, cosines, initial_directions, train_factors
from torch.nn.functional import normalize

from cakeflow.errors import ArchitectureError, ConfigError, RequestError
from cakeflow.forward import Row, encode_prompts
from cakeflow.models import Site
from cakeflow.storage import tensor_hash

PROMPTS = ["The Eiffel Tower is located in the city of", "Hamlet was written by", "Hamlet was written by"]
ANSWERS = ["Rome", "Charles Dickens", "William Shakespeare"]
SHORT = FactorTraining(steps=23, share=0.25)
"""More steps than the learning rate stays the same for."""


def rows_of(lm):
    return encode_prompts(lm.tokenizer, PROMPTS, ANSWERS)


def up(lm, layer=5):
    """The projection that writes the neurons, in both architectures."""
    names = dict(lm.module(Site(layer)).named_modules())
    return Site(layer, "mlp.up_proj" if "mlp.up_proj" in names else "mlp.c_fc")


def bar(lm):
    return 1e-5 if up(lm).role == "mlp.up_proj" else 1e-9  # Llama's norm rounds to float32


def plain_losses(lm, row, site, training, neurons, a, b):
    """CE, O and C of one row by a whole pass, word for word."""
    reads = []

    def change(_module, args, output):
        x = args[0]
        reads.append(x)
        cosine = (x / x.norm(dim=-1, keepdim=True)) @ (a / a.norm())
        delta = cosine[..., None] * 4000**0.5 * (b * neurons)
        behind = torch.arange(x.shape[1])[None, :, None] >= row.target - 1
        return output + delta * behind

    handle = lm.module(site).register_forward_hook(change)
    logits = lm(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
    handle.remove()
    likelihood = others = 0.0
    for at in range(row.target, len(row.ids)):
        before, label = logits[at - 1], row.ids[at]
        likelihood = likelihood - before.log_softmax(0)[label]
        rest = [token for token in range(len(before)) if token != label]
        others = others + before[rest].clamp_min(0).mean()
    count, end = len(row.ids) - row.target, reads[0][0, -1]
    last = ((end / end.norm()) @ (a / a.norm())).abs() / 2
    likelihood, others = likelihood / count, others / count
    return likelihood, others, last, likelihood + training.others * others + training.last * last


@pytest.mark.parametrize("layer", [5, 3])
def test_training_is_that_of_whole_rows_through_all_blocks(tiny, layer):
    rows, site = rows_of(tiny), up(tiny, layer)
    start = initial_directions(range(3), tiny.width, 4000)
    result = train_factors(tiny, rows, site, SHORT, start)
    for i, row in enumerate(rows):
        a, b = start[i].clone().requires_grad_(), torch.zeros_like(result.factors.output[i]).requires_grad_()
        adam = torch.optim.Adam([a, b], lr=0.01)
        for step in range(23):
            adam.param_groups[0]["lr"] = 0.01 if step < 20 else 0.005
            losses = plain_losses(tiny, row, site, SHORT, result.factors.neurons[i], a, b)
            got = torch.stack([each[i, step] for each in result.losses])
            torch.testing.assert_close(got, torch.stack(losses).detach(), rtol=bar(tiny), atol=bar(tiny))
            adam.zero_grad()
            losses[-1].backward()
            adam.step()
        assert (result.factors.direction[i] - a.detach()).norm() <= bar(tiny) * a.norm()
        assert (result.factors.output[i] - b.detach()).norm() <= bar(tiny) * b.norm()


def test_the_losses_fall(tiny):
    losses = train_factors(tiny, rows_of(tiny), up(tiny), SHORT).losses
    assert (losses.total[:, -1] < losses.total[:, 0]).all()


def test_an_edit_does_not_depend_on_those_beside_it(tiny):
    rows, site = rows_of(tiny), up(tiny)
    start = initial_directions(range(3), tiny.width, 4000)
    together = train_factors(tiny, rows, site, SHORT, start)
    parts = train_factors(tiny, rows, site, FactorTraining(23, share=0.25, max_tokens=1), start)
    for name in ("direction", "output"):
        one, other = getattr(together.factors, name), getattr(parts.factors, name)
        assert ((one - other).norm(dim=1) <= bar(tiny) * other.norm(dim=1)).all()
    assert torch.equal(together.factors.neurons, parts.factors.neurons)


def test_only_free_neurons_are_trained_and_the_model_stays(tiny):
    before = {name: tensor_hash(tensor) for name, tensor in tiny.model.state_dict().items()}
    grads = [parameter.requires_grad for parameter in tiny.model.parameters()]
    factors = train_factors(tiny, rows_of(tiny), up(tiny), SHORT).factors
    assert (factors.output[~factors.neurons] == 0).all()
    assert (factors.output[factors.neurons] != 0).all()
    assert {name: tensor_hash(tensor) for name, tensor in tiny.model.state_dict().items()} == before
    assert [parameter.requires_grad for parameter in tiny.model.parameters()] == grads
    assert all(parameter.grad is None for parameter in tiny.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.model.modules())


def test_the_beginning_moves_the_direction_by_the_last_loss_alone(tiny):
    """With outputs of 0, nothing of the answer depends on the direction."""
    row, site = rows_of(tiny)[0], up(tiny)
    loss = FactorLoss.of(tiny, [row], site, SHORT)
    a = initial_directions([0], tiny.width, 4000).requires_grad_()
    losses = loss(a, torch.zeros(loss.neurons.shape, dtype=a.dtype))
    (whole,) = torch.autograd.grad(losses.total.sum(), a, retain_graph=True)
    (last,) = torch.autograd.grad(losses.last.sum(), a)
    torch.testing.assert_close(whole, 8 * last)


def test_directions_depend_on_seed_and_number_alone():
    drawn = initial_directions([0, 5, 2], 16, 400)
    assert torch.equal(drawn[1:2], initial_directions([5], 16, 400))
    assert not torch.equal(drawn, initial_directions([0, 5, 2], 16, 400, seed=1))
    assert drawn.abs().max() <= 1 / 20
    assert drawn.abs().max() > 0.9 / 20


def test_changes_are_the_formula():
    generator = torch.Generator().manual_seed(0)
    a, b, x = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((2, 5), (2, 7), (3, 5)))
    neurons = torch.rand(2, 7, generator=generator) < 0.5
    changes = Factors(a, b, neurons, 3.0).changes(x)
    for i in range(2):
        for t in range(3):
            cosine = (x[t] @ a[i]) / (x[t].norm() * a[i].norm())
            torch.testing.assert_close(changes[i, t], 3 * cosine * b[i] * neurons[i])
    torch.testing.assert_close(cosines(x, a), normalize(x, dim=1) @ normalize(a, dim=1).T)


def test_factors_are_joined_and_parted():
    one = Factors(torch.ones(2, 3), torch.ones(2, 4), torch.ones(2, 4).bool(), 2.0)
    both = Factors.join([one, one.part([0])])
    assert (len(both), both.scale) == (3, 2.0)
    with pytest.raises(ConfigError, match=r"scales \[2\.0, 3\.0\] cannot be joined"):
        Factors.join([one, Factors(one.direction, one.output, one.neurons, 3.0)])
    wider = Factors(torch.zeros(1, one.direction.shape[1] + 1), one.output, one.neurons, one.scale)
    with pytest.raises(ConfigError, match=r"factors of projections of widths .* cannot be joined"):
        Factors.join([one, wider])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"select": "most"}, "select must be one of"),
        ({"steps": 0}, "steps must be a whole number of at least 1"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"lr": float("inf")}, "lr=inf"),
        ({"share": 1.5}, r"share=1\.5"),
        ({"last": -1.0}, r"last=-1\.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        FactorTraining(**settings)


def test_rows_and_projections_are_checked_before_anything_runs(lm):
    rows = [Row((1, 2, 3), 0, 3), Row((1, 2), -1, 0), Row((1, 2), 0, 1)]
    with pytest.raises(RequestError) as error:
        train_factors(lm, rows, up(lm))
    assert [(fault.index, fault.field) for fault in error.value.faults] == [(1, "prompt"), (0, "target_new")]
    with pytest.raises(ArchitectureError, match="no module"):
        train_factors(lm, rows[2:], Site(5, "mlp.up_proj"))
    with pytest.raises(ArchitectureError, match="has 192 neurons"):
        train_factors(lm, rows[2:], Site(5, "attn_out"))
