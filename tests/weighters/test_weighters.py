"""Weights from scores against the paper's table, static weights, and what is refused."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import editor_of

from cakeflow import Endpoints, OneHot, Scores, Uniform
from cakeflow.core import EditCallback
from cakeflow.data.contexts import Contexts
from cakeflow.errors import ConfigError
from cakeflow.forward import read_keys
from cakeflow.forward.tokens import encode_batch
from cakeflow.models import Site
from cakeflow.testing import WeighterContract
from cakeflow.tracing import CausalTrace
from cakeflow.weighters import Weighter
from cakeflow.weighters.base import effective_layers
from cakeflow.weighters.scores import score_weights

PAPER = [0.088, 0.090, 0.092, 0.094, 0.095]
LAYERS = [1, 2, 3, 4]


def paper(dtype=torch.float64):
    return torch.tensor(PAPER, dtype=dtype)


@pytest.fixture
def batch(lm, requests):
    return encode_batch(lm, requests[:2], Contexts())


@dataclass(frozen=True)
class KeyNorms(Weighter):
    """Layers by the norms of their keys, as a plugin would: public names only."""

    def weigh(self, lm, batch, layers):
        keys = read_keys(lm, batch, [Site(layer, "mlp_out") for layer in layers])
        return torch.stack([each.norm(dim=1) for each in keys.values()], dim=1)


class TestKeyNorms(WeighterContract):
    weighter = KeyNorms()


def test_a_weighter_sees_the_keys_of_the_first_solve(lm, requests):
    """Those of the lowest layer, below which a batch changes nothing."""
    seen = {}

    class Look(EditCallback):
        def on_layer_solved(self, module, edit):
            seen[edit.context.site.layer] = edit.problem.keys, edit.context.weights

    editor_of(lm, {"callbacks": [Look()], "logger": False}, weighter=KeyNorms()).fit(requests[:2], evaluate=False)
    keys, weights = seen[1]
    torch.testing.assert_close(keys.norm(dim=1), weights[:, 0], rtol=0, atol=1e-12)


def test_the_papers_table():
    weights = score_weights(paper(), tau=0.1)
    assert weights.tolist() == pytest.approx([0.1925, 0.1964, 0.2003, 0.2044, 0.2064], abs=5e-5)
    assert float(effective_layers(weights)) == pytest.approx(4.9967, abs=5e-5)
    assert float(effective_layers(score_weights(paper(), tau=0.01))) == pytest.approx(4.713, abs=5e-4)


@pytest.mark.parametrize("normalization", ["none", "max", "minmax", "zscore"])
@pytest.mark.parametrize("layers", range(1, 8))
def test_infinite_temperature_is_exactly_uniform(lm, batch, layers, normalization):
    scores = {layer: 0.01 * (layer + 1) ** 2 for layer in range(layers)}
    got = Scores(scores, tau=float("inf"), normalization=normalization).weigh(lm, batch, range(layers))
    assert torch.equal(got, Uniform().weigh(lm, batch, range(layers)))
    assert got.dtype == torch.float64


def test_a_small_temperature_takes_the_best_layer():
    assert score_weights(paper(), tau=1e-6).tolist() == pytest.approx([0, 0, 0, 0, 1])


@pytest.mark.parametrize(
    ("normalization", "scores", "expected"),
    [
        ("none", [1, 2, 4], [1, 2, 4]),
        ("max", [1, 2, 4], [0.25, 0.5, 1]),
        ("minmax", [1, 2, 4], [0, 1 / 3, 1]),
        ("zscore", [1, 2, 3], [-(1.5**0.5), 0, 1.5**0.5]),
    ],
)
def test_normalisations(normalization, scores, expected):
    got = score_weights(torch.tensor(scores, dtype=torch.float64), 0.7, normalization)
    torch.testing.assert_close(got, (torch.tensor(expected, dtype=torch.float64) / 0.7).softmax(-1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("normalization", ["minmax", "zscore"])
def test_equal_scores_do_not_divide_by_zero(normalization):
    weights = score_weights(torch.full((3,), 0.5, dtype=torch.float64), 0.1, normalization)
    assert torch.equal(weights, torch.full((3,), 1 / 3, dtype=torch.float64))


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8), st.floats(0.05, 50))
def test_weights_are_a_distribution_in_the_order_of_the_scores(scores, tau):
    scores = torch.tensor(scores, dtype=torch.float64)
    weights = score_weights(scores, tau)
    assert float(weights.sum()) == pytest.approx(1)
    assert (weights[scores.argsort()].diff() >= 0).all()
    assert 1 <= float(effective_layers(weights)) * (1 + 1e-9) <= len(scores) * (1 + 1e-8)


@pytest.mark.parametrize(
    ("weighter", "expected"),
    [
        (Uniform(), [0.25] * 4),
        (OneHot(3), [0, 0, 1, 0]),
        (OneHot("first"), [1, 0, 0, 0]),
        (OneHot("last"), [0, 0, 0, 1]),
        (Endpoints(), [1, 0, 0, 1]),
        (Scores({4: 1.0, 1: 0.0, 3: 0.0, 2: 0.0, 9: 7.0}, tau=1e-3), [0, 0, 0, 1]),
    ],
)
def test_weigh(lm, batch, weighter, expected):
    before = lm.fingerprint()
    weights = weighter.weigh(lm, batch, LAYERS)
    assert weights.tolist() == pytest.approx(expected)
    assert weights.dtype == torch.float64
    assert lm.fingerprint() == before


def test_endpoints_of_one_layer(lm, batch):
    assert Endpoints().weigh(lm, batch, [2]).tolist() == [1.0]


@pytest.mark.parametrize(
    ("weighter", "words"),
    [
        (OneHot(7), r"layer 7 is not among the layers \[1, 2, 3, 4\]"),
        (Scores({1: 0.1, 2: 0.2}), r"no score for layers \[3, 4\]"),
    ],
)
def test_layers_that_do_not_fit_are_named(lm, batch, weighter, words):
    with pytest.raises(ConfigError, match=words):
        weighter.weigh(lm, batch, LAYERS)


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan")])
def test_bad_temperatures(tau):
    with pytest.raises(ConfigError, match="tau must be above 0"):
        Scores({1: 0.1}, tau=tau)


def test_an_unknown_normalisation_is_refused():
    with pytest.raises(ConfigError, match="normalization"):
        Scores({1: 0.1}, normalization="rank")


def test_the_depth_factor_multiplies_the_scores(lm, batch):
    """(l / L)^alpha with l counted from 1: on equal scores it favours deep layers, whatever the temperature."""
    scores = dict.fromkeys(LAYERS, 0.2)
    got = Scores(scores, tau=0.3, depth_power=2.0).weigh(lm, batch, LAYERS)
    factors = torch.tensor([((layer + 1) / lm.depth) ** 2 for layer in LAYERS], dtype=torch.float64)
    torch.testing.assert_close(got, score_weights(0.2 * factors, 0.3), rtol=1e-12, atol=0)
    assert (got.diff() > 0).all()


def test_requests_weigh_layers_by_their_own_traces(tiny, requests, monkeypatch, tmp_path):
    monkeypatch.setenv("CAKEFLOW_CACHE", str(tmp_path))
    batch, before = encode_batch(tiny, requests[:3], Contexts()), tiny.fingerprint()
    trace = CausalTrace(draws=2, noise=0.5)
    layers = list(range(tiny.depth))
    got = Scores(score_source="per_request", tau=0.01, attribution=trace).weigh(tiny, batch, layers)
    assert got.shape == (3, len(layers))
    assert not torch.allclose(got[0], got[1])
    for variants, weights in zip(batch.rows, got, strict=True):
        row = variants[0]
        with torch.no_grad():
            said = int(tiny.model(input_ids=torch.tensor([row.ids[: row.target]])).logits[0, -1].argmax())
        own = replace(row, ids=(*row.ids[: row.target], said))
        scores = trace.run(tiny, [own], layers, tmp_path / "alone").scores
        expected = score_weights(torch.tensor(list(scores.values()), dtype=torch.float64), 0.01)
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-9)
    assert tiny.fingerprint() == before


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scores": {1: float("nan")}}, "score of layer 1 is nan"),
        ({"scores": {1: float("inf")}}, "score of layer 1 is inf"),
        ({"score_source": "per_cluster"}, "score_source"),
        ({"depth_power": float("nan")}, "depth_power"),
    ],
)
def test_bad_scores_and_settings_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        Scores(**settings).check([1])
