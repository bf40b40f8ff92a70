"""Target representations: without heads, or by gradient steps."""

import pytest
import torch
from cakeflow_vision import GradientTargets, HeadTargets, replacements, without_heads
from cakeflow_vision.heads import representations
from cakeflow_vision.targets import TargetProblem
from tiny_vision import random_images, random_vision_model
from torch.nn.functional import cross_entropy

from cakeflow.errors import ConfigError


@pytest.fixture(params=["vit", "deit, two heads"])
def task(request):
    vm = random_vision_model(request.param)
    pixels = vm.pixels(random_images(4))
    features, _ = representations(vm, pixels)
    return vm, TargetProblem(pixels, torch.tensor([0, 1, 2, 3]), features, vm.pixels(random_images(10, 5)))


def test_targets_are_the_representations_without_the_heads(task):
    vm, problem = task
    heads = [(1, 0), (3, 2)]
    targets = HeadTargets(heads=heads).targets(vm, problem)
    means = replacements(vm, "mean", problem.unrelated)
    with without_heads(vm, heads, means, 4):
        expected, _ = representations(vm, problem.pixels)
    assert targets.heads == tuple(heads)
    for path, values in targets.values.items():
        torch.testing.assert_close(values, expected[path], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(values, problem.features[path])


def test_the_best_head_lowers_the_loss_more_than_another(task):
    vm, problem = task

    def loss(targets):
        outputs = [vm.module(path)(values) for path, values in targets.values.items()]
        return float(cross_entropy(torch.stack(outputs).mean(0), problem.labels).detach())

    best = HeadTargets(1).targets(vm, problem)
    others = [HeadTargets(heads=[[layer, head]]).targets(vm, problem) for layer in range(4) for head in range(4)]
    assert loss(best) == pytest.approx(min(map(loss, others)), rel=1e-4)
    assert 0 < best.numbers["heads/agreement"] <= 1


def test_random_heads_are_drawn_by_their_seed(task):
    vm, problem = task
    drawn = [HeadTargets(3, ranking="random", seed=seed).targets(vm, problem).heads for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_gradient_steps_lower_the_loss_and_keep_to_the_clamp(task):
    vm, problem = task
    targets = GradientTargets(steps=50, clamp=0.3).targets(vm, problem)
    start = cross_entropy(
        torch.stack([vm.module(path)(each) for path, each in problem.features.items()]).mean(0), problem.labels
    )
    assert targets.numbers["targets/loss"] < float(start.detach())
    for path, values in targets.values.items():
        change, norm = (values - problem.features[path]).norm(dim=1), problem.features[path].norm(dim=1)
        assert bool((change <= 0.3 * norm * (1 + 1e-5)).all())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HeadTargets(0), "top"),
        (lambda: HeadTargets(replacement="noise"), "replacement must be one of zero, mean"),
        (lambda: HeadTargets(ranking="best"), "ranking must be one of"),
        (lambda: GradientTargets(steps=0), "steps"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_heads_that_the_model_has_not_are_refused(task):
    vm, problem = task
    with pytest.raises(ConfigError, match="4 blocks of 4 heads"):
        HeadTargets(heads=[[4, 0]]).targets(vm, problem)
    with pytest.raises(ConfigError, match="top is 17"):
        HeadTargets(17).targets(vm, problem)
