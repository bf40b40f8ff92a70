"""Target values against a plain reference (one request, one row, every block at a time) and the official numbers."""

import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from cakeflow import Contexts, GradientSearch
from cakeflow.errors import ConfigError, NumericalError
from cakeflow.forward.tokens import encode_batch
from cakeflow.models.architecture import Site

CONTEXTS = Contexts.of(["{}", "Because of the high cost of living in. {}", "I am. {}"])
FAST = GradientSearch(steps=6, lr=0.3)


def tokenised(tok, request, contexts):
    """Ids, subject's last token and first target token of the request in every context."""
    prompt, end = request.prompt.replace("{}", request.subject), request.prompt.index("{}") + len(request.subject)
    for template in contexts.templates:
        text = f"{template.replace('{}', prompt)} {request.target_new}"
        encoded = tok(text)
        target = encoded.char_to_token(len(text) - len(request.target_new) - 1)  # the space belongs to the target
        yield encoded["input_ids"], encoded.char_to_token(template.index("{}") + end - 1), target


def added(model, modules, ids, at, deltas):
    """Log-probabilities with a vector added to each module's output at one token, and what the modules gave there."""
    seen, handles = {}, []
    for number, module in enumerate(modules):

        def hook(_module, _args, output, number=number):
            value = output[0] if isinstance(output, tuple) else output
            seen[number] = value[0, at].detach()
            value = value + torch.nn.functional.one_hot(torch.tensor(at), len(ids))[None, :, None] * deltas[number]
            return (value, *output[1:]) if isinstance(output, tuple) else value

        handles.append(module.register_forward_hook(hook))
    result = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    for handle in handles:
        handle.remove()
    return result, [seen[number] for number in range(len(modules))]


def plain(lm, request, contexts, settings, layer):
    """``compute_z`` (and PMET's ``compute_zs``) from the papers, without anything of the package but module paths."""
    roles = [role for role in (settings.role, settings.also) if role]
    modules = [lm.model.get_submodule(lm.architecture.path(Site(layer, role))) for role in roles]
    rows, essence = list(tokenised(lm.tokenizer, request, contexts)), lm.tokenizer(f"{request.subject} is a")
    essence, last = essence["input_ids"], essence.char_to_token(len(request.subject) - 1)
    deltas = [torch.zeros(48, dtype=torch.float64, requires_grad=True) for _ in modules]
    with torch.no_grad():
        before = added(lm.model, modules, essence, last, deltas)[0][last]
        starts = added(lm.model, modules, *rows[0][:2], deltas)[1]
    adam, factor = torch.optim.Adam(deltas, lr=settings.lr), 1.0
    for step in range(settings.steps):
        nll, top = 0, True
        for ids, at, target in rows:
            log_probs = added(lm.model, modules, ids, at, deltas)[0][target - 1 : -1]
            wanted = torch.tensor(ids[target:])
            top &= bool((log_probs.argmax(-1) == wanted).all())
            nll = nll + torch.nn.functional.nll_loss(log_probs, wanted) / len(rows)
        now = added(lm.model, modules, essence, last, deltas)[0][last]
        divergence = (now.exp() * (now - before)).sum()
        decay = sum(delta.norm() / start.norm() ** 2 for delta, start in zip(deltas, starts, strict=True))
        loss = factor * nll + settings.kl_factor * divergence + settings.weight_decay * decay
        factor = settings.ease if top else 1.0
        if loss < settings.stop_loss or (top and divergence < settings.stop_kl) or step == settings.steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        for delta, start in zip(deltas, starts, strict=True):
            delta.data *= min(1.0, float(settings.clamp * start.norm() / delta.detach().norm()))
    lm.model.zero_grad()
    return (starts[0] + deltas[0]).detach(), loss.detach(), torch.exp(-nll).detach(), step + 1


def relative(got, want):
    return float((got - want).norm() / want.norm())


@pytest.fixture
def batch(lm, requests):
    return encode_batch(lm, requests[1:6], CONTEXTS)


@pytest.mark.parametrize(
    ("role", "layer", "settings"),
    [
        ("block", 4, FAST),
        ("block", 0, replace(FAST, clamp=0.2)),
        ("block", 1, replace(FAST, stop_loss=5.8)),
        ("mlp_out", 3, FAST),
        ("attn_out", 2, replace(FAST, kl_factor=1.0, weight_decay=3.0)),
        ("mlp_out", 3, replace(FAST, also="attn_out", clamp=2.0)),
        ("mlp_out", 2, replace(FAST, also="attn_out", steps=30, lr=0.5, clamp=9.0, ease=0.1, stop_kl=0.5)),
        ("block", 4, replace(FAST, steps=25, lr=0.5, clamp=9.0, ease=0.1, kl_factor=3.0)),
    ],
)
def test_equals_the_plain_reference(tiny, requests, role, layer, settings):
    settings = replace(settings, role=role)
    chosen = requests[2:4]
    found = settings.optimize(tiny, encode_batch(tiny, chosen, CONTEXTS), layer)
    for i, request in enumerate(chosen):
        z, loss, probability, steps = plain(tiny, request, CONTEXTS, settings, layer)
        assert relative(found.values[i], z) < 1e-9
        assert found.loss[i] == pytest.approx(float(loss), rel=1e-9)
        assert found.probability[i] == pytest.approx(float(probability), rel=1e-9)
        assert found.steps[i] == steps
        assert bool(found.converged[i]) is bool(loss < settings.stop_loss)


@pytest.mark.parametrize(("method", "layer"), [("memit", 4), ("alphaedit_blue", 1)])
def test_equals_the_official_numbers(tiny, requests, golden, method, layer):
    arch = tiny.model.config.model_type
    setup = json.loads((golden / "tiny" / f"{arch}_golden.json").read_text())["_setup"]
    wanted = load_file(golden / "tiny" / f"{arch}_golden.safetensors")[f"{method}/z/{layer}"]
    batch = encode_batch(tiny, requests, Contexts.of(setup["context_templates"]))
    assert relative(GradientSearch().optimize(tiny, batch, layer).values, wanted) < {"gpt2": 1e-10, "llama": 1e-5}[arch]


def test_padding_side_of_the_tokenizer_does_not_matter(tiny, requests):
    results = []
    for side in ("left", "right"):
        tiny.tokenizer.padding_side = side
        results.append(FAST.optimize(tiny, encode_batch(tiny, requests[:4], CONTEXTS), 3).values)
    assert torch.equal(*results)


@pytest.mark.parametrize("budget", [1, 7, 50, 10_000])
def test_token_budget_bounds_memory_and_changes_nothing(tiny, requests, budget):
    batch = encode_batch(tiny, requests[:4], CONTEXTS)
    wanted = FAST.optimize(tiny, batch, 3)
    found = replace(FAST, max_tokens=budget).optimize(tiny, batch, 3)
    assert relative(found.values, wanted.values) < 1e-9
    assert torch.equal(found.steps, wanted.steps)


def test_batch_size_and_order_do_not_matter(tiny, requests):
    together = FAST.optimize(tiny, encode_batch(tiny, requests[:5], CONTEXTS), 3)
    order = [3, 0, 4, 1, 2]
    shuffled = FAST.optimize(tiny, encode_batch(tiny, [requests[i] for i in order], CONTEXTS), 3)
    assert relative(shuffled.values, together.values[order]) < 1e-9
    for i in range(5):
        alone = FAST.optimize(tiny, encode_batch(tiny, requests[i : i + 1], CONTEXTS), 3)
        assert relative(alone.values[0], together.values[i]) < 1e-9


def test_a_fact_that_stops_early_leaves_the_others_alone(tiny, requests):
    batch = encode_batch(tiny, requests, CONTEXTS)
    free = replace(FAST, steps=9, lr=0.05, weight_decay=0.0, kl_factor=0.0)
    halfway = replace(free, steps=4, stop_loss=0).optimize(tiny, batch, 1).loss
    settings = replace(free, stop_loss=float(halfway.median()))
    together = settings.optimize(tiny, batch, 1)
    assert len(set(together.steps.tolist())) >= 3  # they stop at different times
    for i in range(0, len(requests), 3):
        alone = settings.optimize(tiny, encode_batch(tiny, requests[i : i + 1], CONTEXTS), 1)
        assert relative(alone.values[0], together.values[i]) < 1e-9
        assert alone.steps[0] == together.steps[i]
    assert torch.equal(together.converged, together.loss < settings.stop_loss)
    assert together.converged[together.steps < 9].all()


def test_done_at_once_means_no_change(tiny, requests):
    found = replace(FAST, stop_loss=100.0).optimize(tiny, encode_batch(tiny, requests[:3], CONTEXTS), 3)
    assert torch.equal(found.values, found.initial)
    assert found.steps.tolist() == [1, 1, 1]
    assert found.converged.all()


def test_nobody_converged_is_said(lm, batch):
    found = replace(FAST, stop_loss=0.0).optimize(lm, batch, 3)
    assert not found.converged.any()
    assert found.steps.tolist() == [6] * 5


@pytest.mark.parametrize("clamp", [0.05, 0.3])
def test_the_clamp_is_respected(tiny, requests, clamp):
    found = replace(FAST, clamp=clamp, lr=1.0).optimize(tiny, encode_batch(tiny, requests[:4], CONTEXTS), 3)
    ratio = (found.values - found.initial).norm(dim=1) / found.initial.norm(dim=1)
    assert (ratio <= clamp * (1 + 1e-12)).all()
    assert ratio.max() > clamp * 0.999  # and reached


def test_it_does_what_it_is_for(tiny, requests):
    batch = encode_batch(tiny, requests, CONTEXTS)
    free = GradientSearch(steps=12, lr=0.05, weight_decay=0.0, kl_factor=0.0)
    before = replace(free, steps=1).optimize(tiny, batch, 1)
    after = free.optimize(tiny, batch, 1)
    assert (after.loss < before.loss).all()
    assert (after.probability > before.probability).all()


def test_gradients_and_flags_of_the_weights_are_untouched(tiny, requests):
    flags = {}
    for i, parameter in enumerate(tiny.model.parameters()):
        parameter.requires_grad_(i % 3 != 0)
        parameter.grad = torch.full_like(parameter, 7.0)
        flags[i] = (parameter.requires_grad, parameter.detach().clone())
    batch = encode_batch(tiny, requests[:2], CONTEXTS)
    FAST.optimize(tiny, batch, 3)
    with pytest.raises(KeyboardInterrupt):
        FAST.optimize(tiny, batch, 3, progress=interrupt)
    for i, parameter in enumerate(tiny.model.parameters()):
        assert parameter.requires_grad is flags[i][0]
        assert torch.equal(parameter, flags[i][1])
        assert (parameter.grad == 7).all()


def interrupt(_done):
    raise KeyboardInterrupt


def test_no_gradient_context_of_the_caller_is_needed_or_disturbed(lm, batch):
    wanted = FAST.optimize(lm, batch, 3).values
    with torch.no_grad():
        assert torch.equal(FAST.optimize(lm, batch, 3).values, wanted)
        assert not torch.is_grad_enabled()


def test_progress_adds_up_to_the_batch(lm, batch):
    counts = []
    replace(FAST, stop_loss=5.8).optimize(lm, batch, 3, counts.append)
    assert sum(counts) == len(batch)


def test_a_loss_that_is_not_finite_names_its_request(lm, requests):
    """With an infinite step everything that is not done after the first evaluation blows up in the second."""
    batch = encode_batch(lm, requests, CONTEXTS)
    first = replace(FAST, steps=1).optimize(lm, batch, 3).loss
    worst = int(first.argmax())
    settings = replace(FAST, lr=float("inf"), stop_loss=float(first.sort().values[-2:].mean()))
    with pytest.raises(NumericalError) as caught:
        settings.optimize(lm, batch, 3)
    assert str(caught.value).startswith(f"request {worst} ({requests[worst].text!r}): the loss")
    assert "at step 1" in str(caught.value)
    assert all(parameter.requires_grad for parameter in lm.model.parameters())


def test_half_precision_models_get_targets_in_float64(lm, batch):
    wanted = FAST.optimize(lm, batch, 3)
    lm.model.to(torch.bfloat16)
    found = FAST.optimize(lm, batch, 3)
    assert found.values.dtype == found.initial.dtype == torch.float64
    assert torch.isfinite(found.values).all()
    assert relative(found.initial, wanted.initial) < 0.05


@given(st.sampled_from(["steps", "lr", "clamp", "max_tokens"]), st.sampled_from([0, -1, float("nan")]))
def test_bad_settings(name, value):
    with pytest.raises(ConfigError, match=rf"targets\.{name} must be above 0"):
        GradientSearch(**{name: value})


def test_a_search_that_leads_away_from_its_fact_is_refused(lm, requests):
    """A decay that outweighs the fact; the model is surer of itself than a random one, so that it shows."""
    with torch.no_grad():
        lm.model.get_submodule(lm.architecture.final_norm).weight.mul_(4)
    batch = encode_batch(lm, requests[:4], CONTEXTS, first=20)
    with pytest.raises(NumericalError) as caught:
        replace(FAST, steps=4, lr=3.0, clamp=50.0, weight_decay=5e3).optimize(lm, batch, 1)
    words = (
        r"request (\d+) \((.*)\): the search .* at layer 1 did not lower .* \(([\d.]+) before, ([\d.]+) after 4 steps"
    )
    index, text, before, after = re.match(words, str(caught.value)).groups()
    assert text == repr(requests[int(index) - 20].text)
    assert float(after) > float(before) + 0.1


def test_a_search_that_got_nowhere_is_logged(lm, requests, caplog):
    batch, still = encode_batch(lm, requests[:2], CONTEXTS, first=20), replace(FAST, lr=1e-30)
    assert torch.equal(still.optimize(lm, batch, 3).values, replace(still, steps=1).optimize(lm, batch, 3).values)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2  # one step is no search
    for i, message in enumerate(caplog.messages):
        assert message.startswith(
            f"request {20 + i} ({requests[i].text!r}): the search for its target value at layer 3"
        )


def test_a_fact_that_the_model_states_already_may_keep_its_loss(lm, requests, caplog):
    batch = encode_batch(lm, requests[:1], Contexts())
    row = batch.rows[0][0]
    with torch.no_grad():
        likely = lm.model(input_ids=torch.tensor([row.ids[: row.target]])).logits[0, -1].argmax()
    batch = replace(batch, rows=((replace(row, ids=(*row.ids[: row.target], int(likely))),),))
    found = replace(FAST, lr=1e-30).optimize(lm, batch, 3)
    assert not caplog.records
    assert found.steps.tolist() == [6]
    assert torch.equal(found.values, found.initial)
