"""Direct effects of heads: sums of them are the states, and they are small in an exact sense only in the last block."""

import pytest
import torch
from cakeflow_vision import HeadTargets, direct_scores, without_direct_effects
from cakeflow_vision.direct import contributions, last_norm, layer_scale
from cakeflow_vision.heads import representations
from cakeflow_vision.targets import TargetProblem
from tiny_vision import random_images, random_vision_model

from cakeflow.errors import ArchitectureError
from cakeflow.models import Site, capture, read_inputs

NORMED = ("vit", "deit, two heads", "dinov2", "siglip")


@pytest.mark.parametrize("family", NORMED)
@torch.no_grad()
def test_contributions_of_a_block_add_up_to_what_its_attention_writes(family):
    """Without the bias, and through the last norm with its sigma held: gamma (v - mean v) / sigma."""
    vm = random_vision_model(family)
    pixels = vm.pixels(random_images(3))
    site, norm = Site(2, "attn_out"), last_norm(vm)
    with capture(vm, [site]) as outputs, read_inputs(vm, [vm.architecture.final_norm]) as states:
        vm.logits(pixels)
    written = outputs[site] - vm.module(site).bias
    written = written * layer_scale(vm, 2)
    sigma = (states[vm.architecture.final_norm].var(2, correction=0, keepdim=True) + norm.eps).sqrt()
    expected = norm.weight * (written - written.mean(2, keepdim=True)) / sigma
    torch.testing.assert_close(contributions(vm, pixels)[:, 2].sum(1), expected, rtol=1e-4, atol=1e-5)


def test_layer_scale_is_found_and_is_one_where_there_is_none():
    vm = random_vision_model("dinov2")
    assert torch.equal(layer_scale(vm, 1), vm.model.dinov2.encoder.layer[1].layer_scale1.lambda1.detach())
    assert torch.equal(layer_scale(random_vision_model("vit"), 1), torch.ones(32))


@pytest.mark.parametrize("family", NORMED[:3])
def test_a_score_is_the_rivals_logit_of_the_effect_less_that_of_the_label(family):
    """The classifiers are linear and pooling is, so taking an effect away changes the logits by the score."""
    vm = random_vision_model(family)
    pixels = vm.pixels(random_images(4))
    before = vm.logits(pixels).detach()
    labels = before.topk(2, 1).indices[:, 1]
    rivals = before.argmax(1)
    scores = direct_scores(vm, pixels, labels)
    for head in [(3, 1), (0, 2)]:
        features = without_direct_effects(vm, [head], pixels)
        after = torch.stack([vm.module(path)(each) for path, each in features.items()]).mean(0)
        rows = torch.arange(4)
        fall = (before - after)[rows, rivals] - (before - after)[rows, labels]
        torch.testing.assert_close(scores[:, head[0], head[1]], fall.detach(), rtol=1e-3, atol=1e-4)


def test_targets_lack_the_direct_effects_and_no_more():
    vm = random_vision_model("dinov2")
    pixels = vm.pixels(random_images(4))
    features, _ = representations(vm, pixels)
    problem = TargetProblem(pixels, torch.tensor([0, 1, 2, 3]), features, vm.pixels(random_images(6, 5)))
    direct = HeadTargets(2, ranking="direct", effect="direct").targets(vm, problem)
    scores = direct_scores(vm, pixels, problem.labels).mean(0)
    assert [tuple(head) for head in direct.heads] == [
        divmod(place, vm.heads) for place in scores.flatten().argsort(descending=True)[:2].tolist()
    ]
    expected = without_direct_effects(vm, direct.heads, pixels)["classifier"]
    torch.testing.assert_close(direct.values["classifier"], expected)
    total = HeadTargets(2, ranking="direct").targets(vm, problem)
    assert total.heads == direct.heads
    assert not torch.allclose(total.values["classifier"], expected)


def test_a_model_without_a_norm_on_the_way_is_refused():
    vm = random_vision_model("clip")  # its last norm reads the class token alone, which its classifier does not
    with pytest.raises(ArchitectureError, match="ranking: exact"):
        direct_scores(vm, vm.pixels(random_images(1)), torch.tensor([0]))
