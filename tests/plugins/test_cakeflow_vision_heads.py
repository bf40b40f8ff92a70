"""Scores of heads: against whole passes without each head, and to first order."""

import pytest
import torch
from cakeflow_vision import first_order_scores, replacements, score_heads, top_heads, without_heads
from cakeflow_vision.heads import agreement, representations
from tiny_vision import FAMILIES, random_images, random_vision_model
from torch.nn.functional import cross_entropy

from cakeflow.models import Site, capture


def problem(vm, count=5):
    return vm.pixels(random_images(count)), torch.arange(count) % 5


def plain_scores(vm, pixels, labels, means):
    """One whole pass per head."""
    whole = cross_entropy(vm.logits(pixels), labels, reduction="none")
    scores = torch.zeros(len(pixels), vm.depth, vm.heads)
    for layer in range(vm.depth):
        for head in range(vm.heads):
            with without_heads(vm, [(layer, head)], means, len(pixels)):
                scores[:, layer, head] = whole - cross_entropy(vm.logits(pixels), labels, reduction="none")
    return scores


@torch.no_grad()
@pytest.mark.parametrize("replacement", ["zero", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_from_the_cached_input_of_a_block_are_those_of_whole_passes(family, replacement):
    vm = random_vision_model(family)
    pixels, labels = problem(vm)
    means = replacements(vm, replacement, vm.pixels(random_images(8, 3)))
    scores = score_heads(vm, pixels, labels, means)
    torch.testing.assert_close(scores, plain_scores(vm, pixels, labels, means), rtol=1e-4, atol=1e-5)
    assert float(scores.abs().max()) > 1e-4


@torch.no_grad()
def test_fewer_blocks_run_than_in_whole_passes():
    """L (L + 1) / 2 + L of them for all heads at once, where whole passes take L^2 + L: 2 L / (L + 1) times as many."""
    vm = random_vision_model()
    pixels, labels = problem(vm)
    assert vm.tuple_size == 0  # found out by a pass of its own
    rows = []
    attentions = [vm.module(Site(layer)).attention for layer in range(vm.depth)]
    handles = [each.register_forward_hook(lambda *_: rows.append(1)) for each in attentions]
    score_heads(vm, pixels, labels, replacements(vm, "zero"))
    for handle in handles:
        handle.remove()
    assert len(rows) == vm.depth + vm.depth * (vm.depth + 1) // 2


@torch.no_grad()
def test_means_are_of_every_position_over_the_images():
    vm = random_vision_model()
    images = random_images(40, 3)
    with capture(vm, [Site(2, "attn_out")], side="in") as inputs:
        vm.logits(vm.pixels(images))
    mean = replacements(vm, "mean", vm.pixels(images))[2]
    torch.testing.assert_close(mean, inputs[Site(2, "attn_out")].mean(0, keepdim=True), rtol=1e-4, atol=1e-5)


def test_first_order_scores_are_the_slope_towards_the_replacement():
    """Against the difference quotient of the loss on the way from a head to its replacement."""
    vm = random_vision_model("dinov2")
    pixels, labels = problem(vm)
    pixels = pixels.double()
    vm.model.double()
    means = replacements(vm, "zero")
    first = first_order_scores(vm, pixels, labels, means)
    layer, step = 2, 1e-6
    site = Site(layer, "attn_out")
    with torch.no_grad():
        with capture(vm, [site], side="in") as inputs:
            whole = cross_entropy(vm.logits(pixels), labels, reduction="none")
        nearer = {**means, layer: (1 - step) * inputs[site]}
        for head in range(vm.heads):
            with without_heads(vm, [(layer, head)], nearer, len(pixels)):
                part = cross_entropy(vm.logits(pixels), labels, reduction="none")
            torch.testing.assert_close(first[:, layer, head], (whole - part) / step, rtol=1e-4, atol=1e-6)
    assert not any(parameter.grad is not None for parameter in vm.model.parameters())


def test_top_heads_have_the_highest_mean_and_say_how_far_images_agree():
    scores = torch.zeros(4, 2, 3)
    scores[:, 1, 2] = torch.tensor([3.0, 3.0, 3.0, -1.0])
    scores[:, 0, 1] = 1.0
    assert top_heads(scores, 2) == [(1, 2), (0, 1)]
    assert agreement(scores, [(1, 2), (0, 1)]) == pytest.approx((0.75 + 1) / 2)


def test_representations_do_not_depend_on_how_many_images_there_are():
    vm = random_vision_model()
    pixels = vm.pixels(random_images(70, 4))
    features, logits = representations(vm, pixels)
    assert torch.equal(features["classifier"][:32], representations(vm, pixels[:32])[0]["classifier"])
    torch.testing.assert_close(logits, vm.module("classifier")(features["classifier"]))
