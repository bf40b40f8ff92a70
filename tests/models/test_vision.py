"""Vision transformers by structure: every family, what is refused, and what removing a head does."""

import numpy as np
import pytest
import torch
from tiny_vision import FAMILIES, LABELS, TOWER, processor, random_images, random_vision_model
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from cakeflow.errors import ArchitectureError, ConfigError
from cakeflow.models.architecture import Site
from cakeflow.models.hooks import add_to_output, capture, read_inputs, replace_columns, start_at
from cakeflow.models.language import LanguageModel
from cakeflow.models.loading import classifies_images, load_editable, load_vision_model
from cakeflow.models.vision import VisionModel


@pytest.fixture(params=FAMILIES)
def family(request):
    return random_vision_model(request.param)


def without_head(vm, site, head, pixels):
    columns = torch.zeros(len(pixels), vm.key_width(site), dtype=torch.bool)
    columns[:, head * vm.head_width : (head + 1) * vm.head_width] = True
    with replace_columns(vm, site, columns, torch.zeros(1, 1, 1)):
        return vm.logits(pixels)


@torch.no_grad()
def test_every_family_is_recognized_by_its_structure(family):
    pixels = family.pixels(random_images(3))
    assert (family.depth, family.width, family.heads, family.head_width) == (4, 32, 4, 8)
    assert family.labels == LABELS
    assert family.logits(pixels).shape == (3, 5)
    site = Site(2, "attn_out")
    with capture(family, [site], side="in") as keys, capture(family, [site]) as values:
        family.logits(pixels)
    output = keys[site] @ family.oriented(site).T + family.module(site).bias
    torch.testing.assert_close(values[site], output, rtol=1e-4, atol=1e-5)
    assert set(family.classifiers) <= {path.removesuffix(".weight") for path in family.editable()}
    assert len(family.architecture.final_norm) > 0


@torch.no_grad()
def test_the_logits_are_the_mean_of_the_classifiers(family):
    with read_inputs(family, family.classifiers) as features:
        logits = family.logits(family.pixels(random_images(3)))
    outputs = [family.module(path)(features[path]) for path in family.classifiers]
    torch.testing.assert_close(logits, torch.stack(outputs).mean(0), rtol=1e-4, atol=1e-5)


def test_two_heads_are_two_classifiers():
    assert random_vision_model("deit, two heads").classifiers == ("cls_classifier", "distillation_classifier")
    assert random_vision_model("deit").classifiers == ("classifier",)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_head_at_zero_moves_the_logits_and_is_the_edit_of_columns(family, attention):
    """transformers 5 takes ``head_mask`` and ignores it, so this has to be seen."""
    family.model.set_attn_implementation(attention)
    pixels, site = family.pixels(random_images(3)), Site(1, "attn_out")
    plain, hooked = family.logits(pixels), without_head(family, site, 2, pixels)
    assert float((plain - hooked).abs().max()) > 1e-3
    family.weight(site)[:, 16:24] = 0
    assert torch.equal(family.logits(pixels), hooked)


@torch.no_grad()
def test_a_pass_starts_at_a_block_with_the_same_bits(family):
    pixels = family.pixels(random_images(3))
    with capture(family, [Site(1)]) as states:
        logits = family.logits(pixels)
    with start_at(family, 2, states[Site(1)]):
        assert torch.equal(family.logits(pixels), logits)


def test_stages_are_refused_with_the_reason():
    config = AutoConfig.for_model(
        "swin", image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2
    )
    with pytest.raises(ArchitectureError, match="stages of blocks, whose width, heads"):
        VisionModel.wrap(AutoModelForImageClassification.from_config(config), processor())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AutoModel.from_config(ViTConfig(**TOWER, num_labels=3)), "a classifier"),
        (lambda: ViTForImageClassification(ViTConfig(**TOWER, num_channels=1)), "images of 1 channels"),
    ],
)
def test_models_that_cannot_be_edited_are_refused(make, message):
    with pytest.raises(ArchitectureError, match=message):
        VisionModel.wrap(make().eval(), processor())


def test_another_way_to_the_logits_is_refused():
    model = random_vision_model().model
    forward = model.forward

    def doubled(**inputs):
        output = forward(**inputs)
        output.logits = 2 * output.logits + 1
        return output

    model.forward = doubled
    with pytest.raises(ArchitectureError, match="not the mean of what"):
        VisionModel.wrap(model, processor())


def test_the_processor_belongs_to_the_hash():
    vm = random_vision_model()
    other = VisionModel.wrap(vm.model, processor(size=16))
    assert other.fingerprint() == vm.fingerprint()
    other.processor.image_mean = [0.4, 0.5, 0.5]
    assert other.fingerprint() != vm.fingerprint()


def test_pixels_are_those_of_the_processor():
    vm = random_vision_model()
    image = np.arange(16 * 16 * 3, dtype=np.int64).reshape(16, 16, 3).astype(np.uint8)
    expected = (torch.tensor(image).permute(2, 0, 1).double() / 255 - 0.5) / 0.5
    torch.testing.assert_close(vm.pixels([image])[0].double(), expected, rtol=0, atol=1e-6)


def test_a_folder_loads_with_its_processor_and_gives_the_same_logits(tmp_path):
    vm = random_vision_model("dinov2")
    vm.model.save_pretrained(tmp_path)
    vm.processor.save_pretrained(tmp_path)
    loaded, images = load_vision_model(tmp_path), random_images(2)
    with torch.no_grad():
        assert torch.equal(loaded.logits(loaded.pixels(images)), vm.logits(vm.pixels(images)))
    assert loaded.labels == LABELS


def test_a_folder_without_a_model_or_a_classifier_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="neither a folder nor a hub id of an image classifier"):
        load_vision_model(tmp_path)
    AutoModel.from_config(ViTConfig(**TOWER)).save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="its files lack weights, which would be random: classifier"):
        load_vision_model(tmp_path)


@torch.no_grad()
def test_states_can_be_added_to_the_last_norm():
    vm = random_vision_model("vit")
    pixels, delta = vm.pixels(random_images(2)), torch.randn(2, 17, 32)
    with read_inputs(vm, ["classifier"]) as before:
        vm.logits(pixels)
    with add_to_output(vm, vm.architecture.final_norm, delta), read_inputs(vm, ["classifier"]) as after:
        vm.logits(pixels)
    torch.testing.assert_close(after["classifier"], before["classifier"] + delta[:, 0], rtol=1e-5, atol=1e-5)
    assert not vm.module(vm.architecture.final_norm)._forward_hooks


def test_a_bias_is_a_row_that_an_edit_may_change():
    vm = random_vision_model("dinov2")
    name = f"{vm.architecture.attn_out.format(1)}.bias"
    assert name in vm.editable()
    assert vm.oriented(name).shape == (1, 32)


def test_noise_is_always_the_same_and_another_model_keeps_the_structure():
    vm = random_vision_model()
    assert torch.equal(vm.noise(3), random_vision_model(seed=5).noise(3))
    assert len(vm.noise(2).unique()) > 100
    other = random_vision_model(seed=5)
    exchanged = vm.exchanged(other.model, other.preprocessor)
    assert exchanged.model is other.model
    assert exchanged.classifiers == vm.classifiers
    assert vm.preprocessor is vm.processor


def test_a_folder_says_whether_it_classifies_images(tmp_path, tiny):
    vm = random_vision_model()
    vm.model.save_pretrained(tmp_path / "vision")
    vm.processor.save_pretrained(tmp_path / "vision")
    tiny.model.save_pretrained(tmp_path / "words")
    tiny.tokenizer.save_pretrained(tmp_path / "words")
    assert isinstance(load_editable(tmp_path / "vision"), VisionModel)
    assert isinstance(load_editable(tmp_path / "words"), LanguageModel)
    assert not classifies_images("smollm2-135m")
    assert not classifies_images(tmp_path / "absent")
