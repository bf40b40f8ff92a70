"""Heads removed by weights: the same logits as hooks, an alignment that is least squares, and bits that come back."""

import pytest
import torch
from cakeflow_vision import HeadRemoval, HeadTargets, without_heads
from cakeflow_vision.heads import replacements, representations
from test_cakeflow_vision import bits, mistakes, same
from tiny_vision import FAMILIES, random_images, random_vision_model

from cakeflow import Editor
from cakeflow.errors import ArchitectureError, ConfigError
from cakeflow.models import Site

QUIET = {"logger": False, "enable_progress_bar": False}
HEADS = [[1, 0], [1, 3], [3, 2]]


def editor_of(vm, replacement="mean", **settings):
    heads = HeadTargets(heads=HEADS, replacement=replacement)
    return Editor(HeadRemoval(vm, heads, unrelated=random_images(24, 9), **settings), QUIET)


@pytest.mark.parametrize("family", FAMILIES)
def test_columns_that_are_zero_give_the_logits_of_hooks_and_come_back_bit_for_bit(family):
    vm = random_vision_model(family)
    original, pixels = bits(vm), vm.pixels(random_images(6, 4))
    with torch.no_grad(), without_heads(vm, [tuple(each) for each in HEADS], replacements(vm, "zero"), 6):
        expected = vm.logits(pixels)
    editor = editor_of(vm, "zero", realign=False)
    editor.fit(mistakes(vm, 4))
    weight = vm.oriented(Site(1, "attn_out")).view(32, vm.heads, vm.head_width)
    assert not weight[:, [0, 3]].any()
    assert weight[:, 1].any()
    with torch.no_grad():
        torch.testing.assert_close(vm.logits(pixels), expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(vm.logits(pixels), _logits_before(editor, vm, pixels), atol=1e-3)
    editor.rollback()
    assert same(bits(vm), original)


def _logits_before(editor, vm, pixels):
    with editor.reverted():
        return vm.logits(pixels)


def test_the_bias_takes_the_mean_of_a_removed_head():
    vm = random_vision_model("dinov2")
    site = Site(1, "attn_out")
    weight, bias = vm.oriented(site).clone(), vm.module(site).bias.detach().clone()
    mean = replacements(vm, "mean", vm.pixels(random_images(24, 9)))[1].mean((0, 1))
    original, editor = bits(vm), editor_of(vm, realign=False)
    editor.fit(mistakes(vm, 4))
    columns = torch.zeros(vm.heads, vm.head_width, dtype=torch.bool)
    columns[[0, 3]] = True
    expected = bias + weight @ torch.where(columns.flatten(), mean, 0.0)
    torch.testing.assert_close(vm.module(site).bias.detach(), expected, rtol=1e-4, atol=1e-5)
    editor.rollback()
    assert same(bits(vm), original)


def test_the_alignment_is_the_minimum_of_reading_b():
    """D = W(P - I) solves D (K_U^T K_U + agree K_E^T K_E + mu I) = W (f_U - K_U)^T K_U."""
    vm = random_vision_model("vit")
    weight = vm.oriented("classifier.weight").double().clone()
    requests, others = mistakes(vm, 5), vm.pixels(random_images(24, 9))
    before = representations(vm, others)[0]["classifier"].double()
    editor_of(vm, "zero", agree=2.0, ridge=0.1).fit(requests)
    keys = representations(vm, others)[0]["classifier"].double()
    own = representations(vm, vm.pixels([each.picture.pixels() for each in requests]))[0]["classifier"].double()
    mu = 0.1 * float((keys**2).sum()) / keys.shape[1]
    system = keys.T @ keys + 2.0 * own.T @ own + mu * torch.eye(keys.shape[1])
    expected = weight @ (before - keys).T @ keys @ torch.linalg.inv(system)
    torch.testing.assert_close(vm.oriented("classifier.weight").double() - weight, expected, rtol=1e-3, atol=1e-5)


def test_an_alignment_brings_unrelated_logits_back_towards_the_old_ones():
    others = random_images(24, 9)

    def moved(realign):
        vm = random_vision_model("vit")
        with torch.no_grad():
            before = vm.logits(vm.pixels(others))
            editor_of(vm, realign=realign, ridge=1e-3).fit(mistakes(vm, 4))
            return float((vm.logits(vm.pixels(others)) - before).detach().norm())

    assert moved(True) < 0.5 * moved(False)


def test_later_batches_align_with_the_logits_of_the_unedited_model():
    others = random_images(24, 9)

    def moved(batch_size):
        vm = random_vision_model("vit")
        with torch.no_grad():
            before = vm.logits(vm.pixels(others))
            editor_of(vm, ridge=1e-3, agree=0.0).fit(mistakes(vm, 8), batch_size=batch_size)
            return float((vm.logits(vm.pixels(others)) - before).detach().norm())

    assert moved(2) < 1.05 * moved(8)


def test_what_cannot_be_removed_is_refused():
    vm = random_vision_model()
    with pytest.raises(ConfigError, match=r"agree=-1"):
        HeadRemoval(vm, unrelated=random_images(2), agree=-1)
    vm.module(Site(1, "attn_out")).register_parameter("bias", None)
    original, editor = bits(vm), editor_of(vm, realign=False)
    with pytest.raises(ArchitectureError, match="replacement: zero"):
        editor.fit(mistakes(vm, 2), evaluate=False)
    assert same(bits(vm), original)
