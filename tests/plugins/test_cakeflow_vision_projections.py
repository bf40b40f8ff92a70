"""Edits of MLPs at the class token: the search lowers the loss, the solve is least squares, tokens are protected."""

import pytest
import torch
from cakeflow_vision import ProjectionEdit, RelativeRidge, ValueSearch
from test_cakeflow_vision import bits, mistakes, same
from tiny_vision import FAMILIES, random_images, random_vision_model
from torch.nn.functional import cross_entropy

from cakeflow import Editor, LeastSquares, NullSpace
from cakeflow.errors import ConfigError
from cakeflow.models import Site, capture, inject

QUIET = {"logger": False, "enable_progress_bar": False}


def editor_of(vm, **settings):
    arguments = {"unrelated": random_images(24, 9), "max_relative_update": 100.0, "solver": RelativeRidge(), **settings}
    return Editor(ProjectionEdit(vm, **arguments), QUIET)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_changes_the_blocks_alone_lowers_the_loss_and_comes_back(family):
    vm = random_vision_model(family)
    original, requests = bits(vm), mistakes(vm, 4)
    pixels = vm.pixels([each.picture.pixels() for each in requests])
    labels = torch.tensor([each.label for each in requests])

    def loss():
        with torch.no_grad():
            return float(cross_entropy(vm.logits(pixels), labels))

    before, editor = loss(), editor_of(vm, preserve=1e-3, layers=[-3, -2])
    editor.fit(requests)
    assert loss() < before
    changed = {name for name, each in bits(vm).items() if not torch.equal(each, original[name])}
    assert changed == {vm.weight_name(Site(layer, "mlp_out")) for layer in (1, 2)}
    editor.rollback()
    assert same(bits(vm), original)


def test_a_search_keeps_to_its_clamp_and_ends_where_the_loss_says():
    vm = random_vision_model()
    pixels, labels, site = vm.pixels(random_images(3)), torch.tensor([0, 1, 2]), Site(2, "mlp_out")
    with torch.no_grad(), capture(vm, [site]) as outputs:
        whole = cross_entropy(vm.logits(pixels), labels)
    delta, loss = ValueSearch(steps=40, clamp=0.5).search(vm, site, pixels, labels)
    assert loss < float(whole)
    assert bool((delta.norm(dim=1) <= 0.5 * outputs[site][:, 0].norm(dim=1) * (1 + 1e-5)).all())
    with torch.no_grad(), inject(vm, site, delta, torch.zeros(3, dtype=torch.long)):
        assert float(cross_entropy(vm.logits(pixels), labels)) < float(whole)


@pytest.mark.parametrize("tokens", ["first", "all"])
def test_the_update_is_least_squares_with_the_second_moment_of_these_tokens(tokens):
    vm = random_vision_model()
    site, requests, others = Site(3, "mlp_out"), mistakes(vm, 3), vm.pixels(random_images(24, 9))
    pixels = vm.pixels([each.picture.pixels() for each in requests])
    weight = vm.oriented(site).double().clone()

    def keys_of(pixels):
        with torch.no_grad(), capture(vm, [site], side="in") as inputs:
            vm.logits(pixels)
        return inputs[site].double()

    keys, unrelated = keys_of(pixels)[:, 0], keys_of(others)
    rows = (unrelated[:, :1] if tokens == "first" else unrelated).flatten(0, 1)
    delta, _ = ValueSearch().search(vm, site, pixels, torch.tensor([each.label for each in requests]))
    editor_of(vm, layers=[3], tokens=tokens, solver=LeastSquares(0.5), preserve=0.2).fit(requests)
    system = 0.2 * 24 * rows.T @ rows / len(rows) + keys.T @ keys + 0.5 * torch.eye(keys.shape[1])
    expected = delta.double().T @ keys @ torch.linalg.inv(system)
    torch.testing.assert_close(vm.oriented(site).double() - weight, expected, rtol=1e-3, atol=1e-5)


def test_a_null_space_of_all_tokens_protects_patches_where_that_of_class_tokens_does_not():
    def moved(tokens):
        """How far the edited projection's outputs on the unrelated images move, over the patches."""
        vm = random_vision_model("vit", intermediate_size=96)
        site, others = Site(3, "mlp_out"), vm.pixels(random_images(2, 9))
        with torch.no_grad(), capture(vm, [site]) as before:
            vm.logits(others)
        solver = NullSpace(LeastSquares(1e-6), 1e-3)
        editor_of(vm, layers=[3], tokens=tokens, solver=solver, unrelated=random_images(2, 9)).fit(mistakes(vm, 2))
        with torch.no_grad(), capture(vm, [site]) as after:
            vm.logits(others)
        return float((after[site] - before[site])[:, 1:].norm() / before[site][:, 1:].norm())

    assert moved("all") < 0.05 * moved("first")


@pytest.mark.parametrize("family", ["beit", "clip"])
def test_a_block_whose_class_token_is_not_read_is_refused(family):
    vm = random_vision_model(family)
    original = bits(vm)
    with pytest.raises(ConfigError, match="block 3 writes at the first token does not reach"):
        editor_of(vm, layers=[3]).fit(mistakes(vm, 2), evaluate=False)
    assert same(bits(vm), original)


def test_settings_out_of_range_are_refused():
    vm = random_vision_model()
    with pytest.raises(ConfigError, match="tokens must be one of"):
        ProjectionEdit(vm, tokens="patches", unrelated=random_images(2))
    with pytest.raises(ConfigError, match="names no block"):
        ProjectionEdit(vm, layers=(), unrelated=random_images(2))
    with pytest.raises(ConfigError, match="a weight must be 0 or more"):
        ProjectionEdit(vm, preserve=-1, unrelated=random_images(2))
    with pytest.raises(ConfigError, match="4 is no block"):
        editor_of(vm, layers=[4]).fit(mistakes(vm, 1), evaluate=False)
    with pytest.raises(ConfigError, match="steps"):
        ValueSearch(steps=0)
