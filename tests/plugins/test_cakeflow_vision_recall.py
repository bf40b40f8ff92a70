"""Values kept by the hashes of a model and of images."""

import pytest
import torch
from cakeflow_vision import Recall, probabilities, replacements
from cakeflow_vision.heads import representations
from cakeflow_vision.recall import model_hash
from tiny_vision import random_images, random_vision_model

from cakeflow.data import Picture
from cakeflow.errors import ConfigError
from cakeflow.storage import tensor_hashes, write_tensors


def test_a_value_is_computed_once_for_a_model_and_its_images():
    vm, recall, calls = random_vision_model(), Recall(), []
    images = vm.pixels(random_images(2))

    def value(images, name="a", **further):
        return int(recall(vm, name, [images], lambda: torch.tensor(calls.append(1) or len(calls)), **further))

    assert value(images) == value(images.clone()) == 1
    assert value(images.flip(0)) == 2
    assert value(images, "b") == 3
    assert len(recall) == 3


def test_a_changed_weight_makes_another_model_and_a_changed_classifier_only_where_it_matters():
    vm = random_vision_model()
    whole, body = model_hash(vm), model_hash(vm, classifiers=False)
    with torch.no_grad():
        vm.weight("classifier.weight").add_(1)
    assert model_hash(vm) != whole
    assert model_hash(vm, classifiers=False) == body
    with torch.no_grad():
        next(vm.model.parameters()).add_(1)
    assert model_hash(vm, classifiers=False) != body


def test_representations_are_those_of_the_model_with_the_classifiers_as_they_are():
    vm, recall = random_vision_model("deit, two heads"), Recall()
    pictures = [Picture(image) for image in random_images(5)]
    pixels = vm.pixels(random_images(5))
    before = probabilities(vm, pictures, recall)
    with torch.no_grad():
        vm.weight("cls_classifier.weight").mul_(-1)
    after = probabilities(vm, pictures, recall)
    assert not torch.allclose(before, after)
    with torch.no_grad():
        torch.testing.assert_close(after, vm.logits(pixels).double().softmax(1), rtol=1e-5, atol=1e-6)
    assert len(recall) == 1
    features, _ = representations(vm, pixels, recall)
    assert all(torch.equal(each, representations(vm, pixels)[0][path]) for path, each in features.items())


def test_means_of_heads_are_kept_beside_representations():
    vm, recall = random_vision_model(), Recall()
    pixels = vm.pixels(random_images(6))
    first = replacements(vm, "mean", pixels, recall)
    assert replacements(vm, "mean", pixels, recall) is first
    assert replacements(vm, "zero", pixels, recall) is not first


def test_another_process_reads_values_from_a_folder(tmp_path):
    vm, pixels = random_vision_model("deit, two heads"), random_vision_model().pixels(random_images(6))
    labels = torch.arange(6) % 5
    first = Recall(tmp_path / "kept")
    features, means = representations(vm, pixels, first)[0], replacements(vm, "mean", pixels, first)
    scores = first(vm, "scores", [pixels, labels], lambda: torch.rand(6, 4, 4))

    def never():
        raise AssertionError("computed again")

    later = Recall(tmp_path / "kept")
    assert torch.equal(later(vm, "scores", [pixels, labels], never), scores)
    again = replacements(vm, "mean", pixels, later)
    assert sorted(again) == sorted(means) == [0, 1, 2, 3]
    assert all(torch.equal(again[layer], each) for layer, each in means.items())
    same = later(vm, "representations", [pixels], never, classifiers=False)
    assert all(torch.equal(same[path], each) for path, each in features.items())
    for tensors, metadata in (({"value": scores}, {}), ({"value": scores / 0}, tensor_hashes({"value": scores / 0}))):
        for path in (tmp_path / "kept").glob("*.safetensors"):
            write_tensors(path, tensors, metadata)
        with pytest.raises(ConfigError, match=r"is damaged \(value .*; delete it, and it is computed again"):
            Recall(tmp_path / "kept")(vm, "scores", [pixels, labels], never)
    for path in (tmp_path / "kept").glob("*.safetensors"):
        path.write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="delete it, and it is computed again"):
        Recall(tmp_path / "kept")(vm, "scores", [pixels, labels], never)
