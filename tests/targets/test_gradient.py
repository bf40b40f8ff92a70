"""Target values against a plain search (one request, one row, every block at a time) and the official numbers."""

import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from cakeflow import Contexts, GradientSearch
from cakeflow.errors import ArchitectureError, ConfigError, NumericalError
from cakeflow.forward.fact_tokens import choose_tokens
from cakeflow.forward.tokens import TextBatch, encode_batch
from cakeflow.models.architecture import Site
from cakeflow.models.hooks import capture
from cakeflow.targets import EssenceKL, LossBelow, NormDecay, SolvedAndNear, TargetLikelihood

from .plain import added, likelihood, plain, plain_jointly, relative

CONTEXTS = Contexts.of(["{}", "Because of the high cost of living in. {}", "I am. {}"])
FAST = GradientSearch(steps=6, lr=0.3)
FAR = GradientSearch(steps=25, lr=0.5, clamp=9.0, likelihood=TargetLikelihood(solved_factor=0.1))


@pytest.fixture
def batch(lm, requests):
    return encode_batch(lm, requests[1:6], CONTEXTS)


@pytest.mark.parametrize(
    ("site", "layer", "settings"),
    [
        ("block", 4, FAST),
        ("block", 0, replace(FAST, clamp=0.2)),
        ("block", 1, replace(FAST, stop=LossBelow(5.8))),
        ("mlp_out", 3, FAST),
        ("attn_out", 2, replace(FAST, essence=EssenceKL(1.0), decay=NormDecay(3.0))),
        ("mlp_out", 3, replace(FAST, extra_site="attn_out", clamp=2.0)),
        ("mlp_out", 2, replace(FAR, extra_site="attn_out", steps=30, stop=SolvedAndNear(0.5))),
        ("block", 4, replace(FAR, essence=EssenceKL(3.0))),
        ("block", 2, replace(FAST, betas=(0.5, 0.9))),
        ("block", 4, replace(FAST, steps=12, stride=0.3, betas=(0.8, 0.9))),
        ("mlp_out", 3, replace(FAST, extra_site="attn_out", clamp=2.0, stride=0.1)),
    ],
)
def test_equals_the_plain_reference(tiny, requests, site, layer, settings):
    settings = replace(settings, site=site)
    chosen = requests[2:4]
    result = settings.search(tiny, encode_batch(tiny, chosen, CONTEXTS), layer)
    for i, request in enumerate(chosen):
        z, loss, probability, steps, done = plain(tiny, request, CONTEXTS, settings, layer)
        assert relative(result.values[i], z) < 1e-9
        assert result.loss[i] == pytest.approx(float(loss), rel=1e-9)
        assert result.probability[i] == pytest.approx(float(probability), rel=1e-9)
        assert result.steps[i] == steps
        assert bool(result.converged[i]) is done


@pytest.mark.parametrize(("method", "layer"), [("memit", 4), ("alphaedit_blue", 1)])
def test_equals_the_official_numbers(tiny, requests, golden, method, layer):
    arch = tiny.model.config.model_type
    setup = json.loads((golden / "tiny" / f"{arch}_golden.json").read_text())["_setup"]
    expected = load_file(golden / "tiny" / f"{arch}_golden.safetensors")[f"{method}/z/{layer}"]
    batch = encode_batch(tiny, requests, Contexts.of(setup["context_templates"]))
    assert relative(GradientSearch().search(tiny, batch, layer).values, expected) < {"gpt2": 1e-10, "llama": 1e-5}[arch]


def test_a_first_step_has_the_length_of_its_stride(tiny, requests):
    settings = GradientSearch(steps=2, stride=0.3, stop=LossBelow(-1.0))
    result = settings.search(tiny, encode_batch(tiny, requests[:4], CONTEXTS), 3)
    length = (result.values - result.initial).norm(dim=1) / result.initial.norm(dim=1)
    torch.testing.assert_close(length, torch.full_like(length, 0.3 * settings.clamp))


def test_padding_side_of_the_tokenizer_does_not_matter(tiny, requests):
    results = []
    for side in ("left", "right"):
        tiny.tokenizer.padding_side = side
        results.append(FAST.search(tiny, encode_batch(tiny, requests[:4], CONTEXTS), 3).values)
    assert torch.equal(*results)


@pytest.mark.parametrize("budget", [1, 7, 50, 10_000])
def test_token_budget_bounds_memory_and_changes_nothing(tiny, requests, budget):
    batch = encode_batch(tiny, requests[:4], CONTEXTS)
    expected = FAST.search(tiny, batch, 3)
    result = replace(FAST, max_tokens=budget).search(tiny, batch, 3)
    assert relative(result.values, expected.values) < 1e-9
    assert torch.equal(result.steps, expected.steps)


def test_batch_size_and_order_do_not_matter(tiny, requests):
    together = FAST.search(tiny, encode_batch(tiny, requests[:5], CONTEXTS), 3)
    order = [3, 0, 4, 1, 2]
    shuffled = FAST.search(tiny, encode_batch(tiny, [requests[i] for i in order], CONTEXTS), 3)
    assert relative(shuffled.values, together.values[order]) < 1e-9
    for i in range(5):
        alone = FAST.search(tiny, encode_batch(tiny, requests[i : i + 1], CONTEXTS), 3)
        assert relative(alone.values[0], together.values[i]) < 1e-9


def test_a_fact_that_stops_early_leaves_the_others_alone(tiny, requests):
    batch = encode_batch(tiny, requests, CONTEXTS)
    free = replace(FAST, steps=9, lr=0.05, essence=None, decay=None)
    halfway = replace(free, steps=4, stop=LossBelow(0)).search(tiny, batch, 1).loss
    settings = replace(free, stop=LossBelow(float(halfway.median())))
    together = settings.search(tiny, batch, 1)
    assert len(set(together.steps.tolist())) >= 3  # they stop at different times
    for i in range(0, len(requests), 3):
        alone = settings.search(tiny, encode_batch(tiny, requests[i : i + 1], CONTEXTS), 1)
        assert relative(alone.values[0], together.values[i]) < 1e-9
        assert alone.steps[0] == together.steps[i]
    assert torch.equal(together.converged, together.loss < settings.stop.loss)
    assert together.converged[together.steps < 9].all()


def test_done_at_once_means_no_change(tiny, requests):
    result = replace(FAST, stop=LossBelow(100.0)).search(tiny, encode_batch(tiny, requests[:3], CONTEXTS), 3)
    assert torch.equal(result.values, result.initial)
    assert result.steps.tolist() == [1, 1, 1]
    assert result.converged.all()


def test_nobody_converged_is_said(lm, batch):
    result = replace(FAST, stop=LossBelow(0.0)).search(lm, batch, 3)
    assert not result.converged.any()
    assert result.steps.tolist() == [6] * 5


@pytest.mark.parametrize("clamp", [0.05, 0.3])
def test_the_clamp_is_respected(tiny, requests, clamp):
    result = replace(FAST, clamp=clamp, lr=1.0).search(tiny, encode_batch(tiny, requests[:4], CONTEXTS), 3)
    ratio = (result.values - result.initial).norm(dim=1) / result.initial.norm(dim=1)
    assert (ratio <= clamp * (1 + 1e-12)).all()
    assert ratio.max() > clamp * 0.999  # and reached


def test_it_does_what_it_is_for(tiny, requests):
    batch = encode_batch(tiny, requests, CONTEXTS)
    free = GradientSearch(steps=12, lr=0.05, essence=None, decay=None)
    before = free.measure(tiny, batch, 1)
    after = free.search(tiny, batch, 1)
    assert (after.loss < before.loss).all()
    assert (after.probability > before.probability).all()


def test_gradients_and_flags_of_the_weights_are_untouched(tiny, requests):
    flags = {}
    for i, parameter in enumerate(tiny.model.parameters()):
        parameter.requires_grad_(i % 3 != 0)
        parameter.grad = torch.full_like(parameter, 7.0)
        flags[i] = (parameter.requires_grad, parameter.detach().clone())
    batch = encode_batch(tiny, requests[:2], CONTEXTS)
    FAST.search(tiny, batch, 3)
    with pytest.raises(KeyboardInterrupt):
        FAST.search(tiny, batch, 3, progress=interrupt)
    for i, parameter in enumerate(tiny.model.parameters()):
        assert parameter.requires_grad is flags[i][0]
        assert torch.equal(parameter, flags[i][1])
        assert (parameter.grad == 7).all()


def interrupt(_done):
    raise KeyboardInterrupt


def test_no_gradient_context_of_the_caller_is_needed_or_disturbed(lm, batch):
    expected = FAST.search(lm, batch, 3).values
    with torch.no_grad():
        assert torch.equal(FAST.search(lm, batch, 3).values, expected)
        assert not torch.is_grad_enabled()


def test_progress_adds_up_to_the_batch(lm, batch):
    counts = []
    replace(FAST, stop=LossBelow(5.8)).search(lm, batch, 3, progress=counts.append)
    assert sum(counts) == len(batch)


def test_a_loss_that_is_not_finite_names_its_request(lm, requests):
    """With an infinite step everything that is not done after the first evaluation blows up in the second."""
    batch = encode_batch(lm, requests, CONTEXTS)
    first = FAST.measure(lm, batch, 3).loss
    worst = int(first.argmax())
    settings = replace(FAST, lr=float("inf"), stop=LossBelow(float(first.sort().values[-2:].mean())))
    with pytest.raises(NumericalError) as caught:
        settings.search(lm, batch, 3)
    assert str(caught.value).startswith(f"request {worst} ({requests[worst].text!r}): the loss")
    assert "at step 1" in str(caught.value)
    assert all(parameter.requires_grad for parameter in lm.model.parameters())


def test_half_precision_models_get_targets_in_float64(lm, batch):
    expected = FAST.search(lm, batch, 3)
    lm.model.to(torch.bfloat16)
    result = FAST.search(lm, batch, 3)
    assert result.values.dtype == result.initial.dtype == torch.float64
    assert torch.isfinite(result.values).all()
    assert relative(result.initial, expected.initial) < 0.05


@pytest.mark.parametrize(("dtype", "flash"), [(torch.float32, True), (torch.bfloat16, False), (torch.float16, False)])
def test_only_half_precision_goes_without_flash_attention(dtype, flash, lm, batch):
    """Its backward pass is slow there on a CPU."""
    lm.model.to(dtype)
    seen = set()
    FAST.search(lm, batch, 3, progress=lambda _: seen.add(torch.backends.cuda.flash_sdp_enabled()))
    assert seen == {flash}
    assert torch.backends.cuda.flash_sdp_enabled()


@given(st.sampled_from(["steps", "lr", "clamp", "max_tokens"]), st.sampled_from([0, -1, float("nan")]))
def test_bad_settings(name, value):
    with pytest.raises(ConfigError, match=rf"targets\.{name} must be above 0"):
        GradientSearch(**{name: value})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers from 0 to below 1, got \(0.9, 1.0\)"),
        ({"betas": (-0.1, 0.9)}, "betas must be two numbers"),
        ({"stride": 0.0}, "stride must be above 0, got 0.0"),
    ],
)
def test_bad_steps(settings, words):
    with pytest.raises(ConfigError, match=f"targets.{words}"):
        GradientSearch(**settings)


HEAVY = replace(FAST, steps=4, lr=0.3, clamp=50.0, decay=NormDecay(4.0))
"""A decay that outweighs some of the facts."""


def test_a_fact_whose_search_leads_away_keeps_its_value_and_is_logged(lm, requests, caplog):
    with torch.no_grad():  # surer of itself than a random model, so that it shows where a search leads
        lm.model.get_submodule(lm.architecture.final_norm).weight.mul_(4)
    batch = encode_batch(lm, requests[:8], CONTEXTS, first=20)
    away = [i for i in range(8) if HEAVY.search(lm, batch.part([i]), 1).away.item()]
    others = [i for i in range(8) if i not in away]
    assert others
    words = (
        r"request (\d+) \((.*)\): the search .* at layer 1 did not lower .* \(([\d.]+) before, ([\d.]+) after 4 steps"
    )
    message = next(each for each in caplog.messages if each.startswith(f"request {20 + away[0]} "))
    index, text, before, after = re.match(words, message).groups()
    assert text == repr(requests[int(index) - 20].text)
    assert float(after) > float(before) + 0.1
    targets, alone = HEAVY.search(lm, batch, 1), HEAVY.search(lm, batch.part(others), 1)
    present = HEAVY.measure(lm, batch, 1)
    assert targets.away.nonzero()[:, 0].tolist() == away
    assert torch.equal(targets.values[away], present.values[away])
    torch.testing.assert_close(targets.probability[away], present.probability[away])
    torch.testing.assert_close(targets.values[others], alone.values)
    one_by_one = replace(HEAVY, one_by_one=True)
    torch.testing.assert_close(one_by_one.search(lm, batch, 1).values, targets.values)
    assert torch.equal(one_by_one.search(lm, batch, 1).away, targets.away)
    assert {20 + i for i in away} <= {int(message.split()[1]) for message in caplog.messages}


def test_a_search_that_got_nowhere_is_logged(lm, requests, caplog):
    batch, still = encode_batch(lm, requests[:2], CONTEXTS, first=20), replace(FAST, lr=1e-30)
    assert torch.equal(still.search(lm, batch, 3).values, still.measure(lm, batch, 3).values)
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
    rows = ((replace(row, ids=(*row.ids[: row.target], int(likely))),),)
    batch = TextBatch(batch.requests, rows, batch.essence, batch.weights)
    result = replace(FAST, lr=1e-30).search(lm, batch, 3)
    assert not caplog.records
    assert result.steps.tolist() == [6]
    assert torch.equal(result.values, result.initial)


def test_measuring_is_a_search_of_one_evaluation(tiny, requests):
    batch = encode_batch(tiny, requests[:5], CONTEXTS)
    one, measured = replace(FAR, steps=1).search(tiny, batch, 3), FAR.measure(tiny, batch, 3)
    assert all(torch.equal(value, getattr(measured, name)) for name, value in vars(one).items())
    assert torch.equal(measured.values, measured.initial)


def test_the_limit_of_a_call_replaces_that_of_the_search(tiny, requests):
    batch = encode_batch(tiny, requests[:4], CONTEXTS)
    for find in ("search", "measure"):
        expected = getattr(replace(FAST, max_tokens=7), find)(tiny, batch, 3)
        targets = getattr(FAST, find)(tiny, batch, 3, max_tokens=7)
        assert all(torch.equal(value, getattr(targets, name)) for name, value in vars(expected).items())


def test_targets_inside_the_mlp(tiny, requests):
    """A module that is no role of the architecture, named by its path in the block, wider than the residual stream."""
    path = {"gpt2": "mlp.c_fc", "llama": "mlp.up_proj"}[tiny.model.config.model_type]
    batch, search = encode_batch(tiny, requests[:3], CONTEXTS), replace(FAST, site=path, lr=0.05, decay=None)
    targets = search.search(tiny, batch, 2)
    site = search.value_site(2)
    assert site == Site(2, path)
    with torch.no_grad(), capture(tiny, [site]) as outputs:
        tiny(input_ids=torch.tensor([batch.rows[0][0].ids]))
    assert targets.values.shape == (3, outputs[site].shape[2])
    assert targets.values.shape[1] > tiny.width
    assert relative(targets.initial[0], outputs[site][0, batch.rows[0][0].subject]) < 1e-9
    assert (targets.loss < search.measure(tiny, batch, 2).loss).all()


@pytest.mark.parametrize("sites", [("", None), ("block", ""), ("mlp_out", "mlp_out")])
def test_sites_that_are_not_two_modules_are_refused(sites):
    with pytest.raises(ConfigError, match=rf"targets.site and extra_site .* got {sites[0]!r} and {sites[1]!r}"):
        GradientSearch(site=sites[0], extra_site=sites[1])


def test_a_search_without_a_likelihood_is_refused():
    with pytest.raises(ConfigError, match=r"targets\.likelihood must be an ObjectiveTerm, got None"):
        GradientSearch(likelihood=None)


def test_a_module_that_is_not_there_is_named(lm, batch):
    with pytest.raises(ArchitectureError, match=r"no module 'transformer\.h\.3\.mlp\.gate'"):
        replace(FAST, site="mlp.gate").search(lm, batch, 3)


@pytest.mark.parametrize("loss", [0.0, 5.6])
def test_facts_whose_keys_coincide_share_one_vector(tiny, requests, loss):
    """It minimises the sum of their objectives; a fact with a key of its own gets what it gets alone."""
    prompts = {"{} is": "Rome", "{} lives in": "Oslo"}
    twins = [replace(requests[2], prompt=prompt, target_new=new) for prompt, new in prompts.items()]
    batch = encode_batch(tiny, [twins[0], requests[3], twins[1]], CONTEXTS)
    assert batch.key_groups() == [0, 1, 0]
    settings = replace(FAST, stop=LossBelow(loss))
    joint = settings.search(tiny, batch, 3)
    z, losses, steps, _done = plain_jointly(tiny, twins, CONTEXTS, settings, 3)
    for i, place in enumerate((0, 2)):
        assert relative(joint.values[place], z) < 1e-9
        assert joint.loss[place] == pytest.approx(float(losses[i][0]), rel=1e-9)
        assert joint.probability[place] == pytest.approx(float(torch.exp(-losses[i][1])), rel=1e-9)
        assert joint.steps[place] == steps
    alone = settings.search(tiny, batch.part([1]), 3)
    assert relative(joint.values[1], alone.values[0]) < 1e-9


def test_a_model_whose_logits_are_not_finite_is_named(lm, batch):
    """Of such a model, no comparison tells anything about its attention."""
    with torch.no_grad():
        lm.model.get_submodule(lm.architecture.final_norm).weight[0] = torch.nan
    with pytest.raises(NumericalError, match=r"GPT2LMHeadModel: its logits for a prompt are not finite.*float32"):
        FAST.search(lm, batch, 4)


def test_the_keys_of_one_fact_share_one_vector(tiny, requests):
    """It minimises the sum of their objectives, within the smaller ball: by hand, one row at a time."""
    chats = replace(CONTEXTS, chats=("<user> {}\n", "<user> Hi\n<user> {}\n"))
    facts = choose_tokens(tiny, encode_batch(tiny, requests[2:3], chats), "auto", 3, keys=chats.keys).texts
    settings = replace(FAST, essence=None, lr=0.1, clamp=0.3, steps=8)
    result = settings.search(tiny, facts, 3)

    modules = [tiny.module(Site(3))]
    entries = [[(list(row.ids), row.fact, row.target) for row in rows] for rows in facts.rows]
    delta = [torch.zeros(48, dtype=torch.float64, requires_grad=True)]
    with torch.no_grad():
        starts = [added(tiny.model, modules, *rows[0][:2], delta)[1][0].norm() for rows in entries]
    adam = torch.optim.Adam(delta, lr=settings.lr)
    for step in range(settings.steps):
        losses = [
            likelihood(tiny, modules, rows, delta)[0] + settings.decay.factor * delta[0].norm() / start**2
            for rows, start in zip(entries, starts, strict=True)
        ]
        if step == settings.steps - 1:
            break
        adam.zero_grad()
        sum(losses).backward()
        adam.step()
        delta[0].data *= min(1.0, settings.clamp * float(min(starts)) / float(delta[0].detach().norm()))
    tiny.model.zero_grad()
    for i in (0, 1):
        assert relative(result.values[i] - result.initial[i], delta[0].detach()) < 1e-8
        assert result.loss[i] == pytest.approx(losses[i].item(), rel=1e-8)
