"""Gradients against finite differences and against causal traces; controls against the scores they spoil."""

import pytest
import torch
from cakeflow_attribution import IntegratedGradients, Noisy, Saliency, Shuffled, gradients
from cakeflow_attribution.gradients import states
from torch.autograd.graph import saved_tensors_hooks

from cakeflow import Contexts
from cakeflow.core import TokenCost
from cakeflow.core.config import build_module
from cakeflow.errors import ConfigError, NumericalError
from cakeflow.forward.tokens import encode_batch
from cakeflow.models.architecture import Site
from cakeflow.models.hooks import inject
from cakeflow.tracing import CausalTrace
from cakeflow.weighters import Scores
from cakeflow.weighters.scores import score_weights

LAYERS = [0, 2, 3]
GIVEN = {1: 0.1, 2: 0.4, 3: 0.2, 4: 0.3}


@pytest.fixture(params=[Saliency(), IntegratedGradients(steps=2, trace=CausalTrace(draws=2, noise=0.3))], ids=type)
def attribution(request):
    return request.param


def log_probability(tiny, row, site, deltas):
    """Of the object, by a full pass over copies of this row alone, each with a vector of its own added at the site."""
    ids, at = torch.tensor([row.ids[: row.target]] * len(deltas)), torch.tensor([row.subject] * len(deltas))
    with torch.no_grad(), inject(tiny, site, deltas, at):
        return tiny.model(input_ids=ids).logits[:, -1].log_softmax(-1)[:, row.ids[row.target]]


@pytest.mark.parametrize("role", ["block", "mlp_out", "attn_out"])
def test_saliency_is_the_norm_of_finite_differences(tiny, rows, role):
    got = Saliency(role).attribute(tiny, rows, LAYERS)

    units = torch.eye(tiny.embedding.shape[1], dtype=torch.float64)

    def slopes(row, site, step):
        high, low = (log_probability(tiny, row, site, sign * step * units) for sign in (1, -1))
        return (high - low) / (2 * step)

    for row, scores in zip(rows, got, strict=True):
        for layer, score in zip(LAYERS, scores.tolist(), strict=True):
            site = Site(
                layer, role
            )  # two steps, extrapolated: wide ones, because Llama's norms are computed in float32
            gradient = (4 * slopes(row, site, 0.01) - slopes(row, site, 0.02)) / 3
            assert score == pytest.approx(float(gradient.norm()), rel=1e-4)


@pytest.mark.parametrize("role", ["block", "mlp_out"])
def test_integrated_gradients_are_traces_to_first_order(tiny, rows, role, tmp_path):
    """With vanishing noise both are the same number; what differs is quadratic in the noise."""
    gaps = []
    for noise in (1e-3, 1e-4):
        trace = CausalTrace(role=role, draws=3, noise=noise)
        effects = trace.run(tiny, rows, LAYERS, tmp_path / str(noise)).effects[:, 2]
        scores = IntegratedGradients(steps=4, trace=trace).attribute(tiny, rows, LAYERS)
        gaps.append(float((scores - effects).norm() / effects.norm()))
    assert gaps[1] < 0.02
    assert gaps[1] < 0.3 * gaps[0]


def test_more_steps_converge(tiny, rows):
    few, more, most = (
        IntegratedGradients(steps=steps, trace=CausalTrace(draws=1, noise=0.5)).attribute(tiny, rows, LAYERS)
        for steps in (2, 16, 32)
    )
    assert (more - most).norm() < 0.1 * (few - most).norm()


def test_facts_do_not_influence_each_other_and_the_model_stays(tiny, rows, attribution):
    before = tiny.fingerprint()
    together = attribution.attribute(tiny, rows, LAYERS)
    assert together.shape == (len(rows), len(LAYERS))
    for row, scores in zip(rows, together, strict=True):
        torch.testing.assert_close(attribution.attribute(tiny, [row], LAYERS)[0], scores, rtol=1e-9, atol=1e-15)
    assert tiny.fingerprint() == before
    assert all(parameter.grad is None for parameter in tiny.model.parameters())


def test_fewer_tokens_run_together_within_a_limit_and_the_scores_stay(tiny, rows, attribution, monkeypatch):
    sizes = []
    monkeypatch.setattr(gradients, "states", lambda lm, rows, *rest: sizes.append(len(rows)) or states(lm, rows, *rest))
    free = attribution.attribute(tiny, rows, LAYERS)
    together = max(sizes)
    assert together > 2
    cost = TokenCost.above(tiny, None)
    longest = max(row.target for row in rows)
    room = longest * (cost.graph + cost.through + 30 * cost.hidden) + cost.logits
    sizes.clear()
    narrow = attribution.within(room).within(None).within(2 * room)
    torch.testing.assert_close(narrow.attribute(tiny, rows, LAYERS), free, rtol=1e-9, atol=1e-15)
    assert max(sizes) < together
    assert narrow == attribution.within(None)
    assert repr(narrow) == repr(attribution)
    with pytest.raises(ConfigError, match=r"memory_budget is .* but gradients by the states of a prompt takes about"):
        attribution.within(1000).attribute(tiny, rows, LAYERS)


def test_the_estimate_covers_what_a_pass_keeps(tiny, rows):
    """Every tensor that autograd keeps in the largest pass, counted."""
    cost, kept = TokenCost.above(tiny, None), {}
    own = {each.untyped_storage()._cdata for each in tiny.model.parameters()}

    def save(tensor):
        if (storage := tensor.untyped_storage())._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(save, lambda tensor: tensor):
        sites = [Site(layer) for layer in LAYERS]
        states(tiny, rows, sites, gradients.embeddings(tiny, rows), "log_probability")
    tokens = len(rows) * max(row.target for row in rows)
    assert sum(each.nbytes() for each in kept.values()) <= tokens * cost.graph + len(rows) * cost.logits


def test_a_weighter_measures_global_scores_once_on_what_the_model_knows(tiny, rows, requests, attribution, monkeypatch):
    monkeypatch.setattr("cakeflow.tracing.window.known_rows", lambda lm, facts, limit, **_: (rows, len(rows)))
    prepared = Scores(attribution=attribution).prepare(tiny, LAYERS)
    expected = attribution.attribute(tiny, rows, LAYERS).mean(0)
    assert list(prepared.scores) == LAYERS
    assert list(prepared.scores.values()) == pytest.approx(expected.tolist())
    assert prepared.prepare(tiny, LAYERS) is prepared
    batch = encode_batch(tiny, requests[:2], Contexts())
    torch.testing.assert_close(prepared.weigh(tiny, batch, LAYERS), score_weights(expected, 0.1), rtol=1e-9, atol=0)
    own = Scores(attribution=attribution, score_source="per_request").weigh(tiny, batch, LAYERS)
    assert own.shape == (2, len(LAYERS))


def test_scores_that_are_not_finite_are_refused_before_anything_is_edited(tiny, rows, monkeypatch):
    monkeypatch.setattr("cakeflow.tracing.window.known_rows", lambda lm, facts, limit, **_: (rows, len(rows)))
    with torch.no_grad():
        tiny.model.get_output_embeddings().weight[:] = float("nan")
    with pytest.raises(NumericalError, match="gradient is not finite"):
        Scores(attribution=Saliency()).prepare(tiny, LAYERS)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: IntegratedGradients(steps=0), "steps must be above 0"),
        (lambda: IntegratedGradients(trace=CausalTrace(window=3)), "single layers"),
        (lambda: IntegratedGradients(trace=CausalTrace(tokens="all")), "single layers"),
        (lambda: Noisy(sigma=-1.0), "sigma must be 0 or more"),
        (lambda: Shuffled(Scores(tau=0.0)), "tau must be above 0"),
    ],
)
def test_bad_settings_are_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_shuffling_moves_the_same_scores(tiny):
    layers, scores = list(GIVEN), torch.tensor(list(GIVEN.values()), dtype=torch.float64)
    seen = set()
    for seed in range(20):
        got = Shuffled(seed=seed).change(scores).tolist()
        assert sorted(got) == sorted(GIVEN.values())
        assert got != list(GIVEN.values())
        seen.add(tuple(got))
        moved = Scores(dict(zip(layers, got, strict=True)), tau=0.2)
        weighter = Shuffled(Scores(GIVEN, tau=0.2), seed=seed)
        assert weighter.weigh(tiny, None, layers).equal(moved.weigh(tiny, None, layers))
    assert len(seen) > 5
    assert Shuffled(seed=3).change(scores).equal(Shuffled(seed=3).change(scores))
    assert Shuffled(Scores({1: 0.5})).weigh(tiny, None, [1]).tolist() == [1.0]


def test_noise_has_the_deviation_asked_for(tiny):
    scores = torch.tensor(list(GIVEN.values()), dtype=torch.float64)
    noise = torch.stack([Noisy(sigma=0.1, seed=seed).change(scores) for seed in range(400)]) - scores
    assert abs(float(noise.mean())) < 0.01
    assert float(noise.std()) == pytest.approx(0.1, rel=0.1)
    assert Noisy(sigma=0.0).change(scores).equal(scores)
    plain = Scores(GIVEN, depth_power=1.0, normalization="max")
    assert Noisy(plain, sigma=0.0).weigh(tiny, None, list(GIVEN)).equal(plain.weigh(tiny, None, list(GIVEN)))


@pytest.mark.parametrize("control", [Shuffled, Noisy])
def test_a_control_is_checked_and_prepared_like_what_it_wraps(tiny, rows, control, monkeypatch):
    with pytest.raises(ConfigError, match=r"no score for layers \[2\]"):
        control(Scores({1: 0.1})).check([1, 2])
    monkeypatch.setattr("cakeflow.tracing.window.known_rows", lambda lm, facts, limit, **_: (rows, len(rows)))
    measured = Scores(attribution=Saliency())
    assert control(measured, seed=4).prepare(tiny, LAYERS) == control(measured.prepare(tiny, LAYERS), seed=4)
    assert control(measured).with_scores(GIVEN) == control(measured)
    assert control().with_scores(GIVEN) == control(Scores(GIVEN))


def test_configs_name_them_and_take_the_models_scores(tmp_path):
    path = tmp_path / "method.yaml"
    weighter = "{class_path: cakeflow_attribution.Shuffled, init_args: {inner: {tau: 0.2}}}"
    path.write_text(f"model:\n  layers: [1, 2]\n  weighter: {weighter}\n")
    module = build_module([path], scores={1: 0.3, 2: 0.1})
    assert module.weighter == Shuffled(Scores({1: 0.3, 2: 0.1}, tau=0.2))
    path.write_text(
        "model:\n  layers: [1, 2]\n  weighter:\n    class_path: Scores\n"
        "    init_args: {attribution: {class_path: cakeflow_attribution.Saliency, init_args: {role: mlp_out}}}\n"
    )
    module = build_module([path], scores={1: 0.3, 2: 0.1})
    assert module.weighter == Scores(attribution=Saliency("mlp_out"))
