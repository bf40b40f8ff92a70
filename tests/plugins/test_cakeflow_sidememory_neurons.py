"""Neurons that an answer may change: scores against a dense formula, and the three selections."""

import pytest
import torch
from cakeflow_sidememory.neurons import neuron_scores, require_neurons, select_neurons

from cakeflow.errors import ArchitectureError, ConfigError
from cakeflow.models import Site

SCORES = torch.tensor([[-3.0, 1.0, 2.5, -0.5], [0.1, -0.2, 0.3, -4.0]])


def test_scores_are_the_head_of_the_normed_columns(tiny):
    layer, tokens = tiny.depth - 1, torch.tensor([7, 301])
    down, norm = tiny.oriented(Site(layer, "mlp_out")), tiny.module(tiny.architecture.final_norm)
    head = tiny.head.weight.detach()
    expected = torch.stack(
        [torch.stack([norm(column).detach() @ head[token] for column in down.T]) for token in tokens]
    )
    off = (neuron_scores(tiny, layer, tokens) - expected).norm() / expected.norm()
    assert off <= (1e-12 if norm.weight.shape == getattr(norm, "bias", torch.ones(0)).shape else 1e-6)  # RMS: float32


@pytest.mark.parametrize(("select", "neurons"), [("lowest", [0, 3]), ("highest", [2]), ("magnitude", [0, 3])])
def test_each_token_has_its_share_of_the_neurons(select, neurons):
    assert select_neurons(SCORES, 0.25, select).nonzero().flatten().tolist() == neurons


def test_equal_scores_are_taken_by_index():
    assert select_neurons(torch.zeros(1, 8), 0.25).nonzero().flatten().tolist() == [0, 1]


def test_a_share_below_one_neuron_and_other_selections_are_refused():
    with pytest.raises(ConfigError, match=r"share=0\.2 of 4 neurons is 0"):
        select_neurons(SCORES, 0.2)
    with pytest.raises(ConfigError, match="select must be one of lowest, highest, magnitude, got 'low'"):
        select_neurons(SCORES, 0.5, "low")


def test_a_projection_that_does_not_write_neurons_is_refused(tiny):
    with pytest.raises(ArchitectureError, match=r"writes 48 numbers, and block 5 has \d+ neurons"):
        require_neurons(tiny, Site(5, "mlp_out"))
    with pytest.raises(ArchitectureError, match="no module"):
        require_neurons(tiny, Site(5, "mlp.absent"))
