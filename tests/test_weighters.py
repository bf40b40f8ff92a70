"""Weights from scores against the paper's table, static weights, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cakeflow import Endpoints, OneHot, Scores, Uniform
from cakeflow.batch import encode_batch
from cakeflow.contexts import Contexts
from cakeflow.errors import ConfigError
from cakeflow.weighters.base import effective_layers
from cakeflow.weighters.scores import score_weights

PAPER = [0.088, 0.090, 0.092, 0.094, 0.095]
LAYERS = [1, 2, 3, 4]


def paper(dtype=torch.float64):
    return torch.tensor(PAPER, dtype=dtype)


@pytest.fixture
def batch(lm, requests):
    return encode_batch(lm, requests[:2], Contexts())


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
    ("normalization", "scores", "wanted"),
    [
        ("none", [1, 2, 4], [1, 2, 4]),
        ("max", [1, 2, 4], [0.25, 0.5, 1]),
        ("minmax", [1, 2, 4], [0, 1 / 3, 1]),
        ("zscore", [1, 2, 3], [-(1.5**0.5), 0, 1.5**0.5]),
    ],
)
def test_normalisations(normalization, scores, wanted):
    got = score_weights(torch.tensor(scores, dtype=torch.float64), 0.7, normalization)
    torch.testing.assert_close(got, (torch.tensor(wanted, dtype=torch.float64) / 0.7).softmax(-1), rtol=1e-12, atol=0)


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
    ("weighter", "wanted"),
    [
        (Uniform(), [0.25] * 4),
        (OneHot(3), [0, 0, 1, 0]),
        (Endpoints(), [1, 0, 0, 1]),
        (Scores({4: 1.0, 1: 0.0, 3: 0.0, 2: 0.0, 9: 7.0}, tau=1e-3), [0, 0, 0, 1]),
    ],
)
def test_weigh(lm, batch, weighter, wanted):
    before = lm.fingerprint()
    weights = weighter.weigh(lm, batch, LAYERS)
    assert weights.tolist() == pytest.approx(wanted)
    assert weights.dtype == torch.float64
    assert lm.fingerprint() == before


def test_endpoints_of_one_layer(lm, batch):
    assert Endpoints().weigh(lm, batch, [2]).tolist() == [1.0]


@pytest.mark.parametrize(
    ("weighter", "words"),
    [
        (OneHot(7), r"layer 7 is not among the layers \[1, 2, 3, 4\]"),
        (Scores({1: 0.1, 2: 0.2}), r"no score for layers \[3, 4\]"),
        (Scores(), r"no score for layers \[1, 2, 3, 4\]"),
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
