"""Tiny random vision transformers of every family, built offline, and images for them."""

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    ViTImageProcessorPil,
)

from cakeflow.models.vision import VisionModel

TOWER = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 24, "image_size": 16,
    "patch_size": 4, "initializer_range": 0.4, "layerscale_value": 0.5,
}  # fmt: skip
TEXT = {
    "hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
TOWERS = {"vision_config": TOWER, "text_config": TEXT}
FAMILIES = {
    "vit": TOWER, "deit": TOWER, "deit, two heads": TOWER, "beit": TOWER, "dinov2": {**TOWER, "mlp_ratio": 2},
    "dinov2_with_registers": {**TOWER, "mlp_ratio": 2}, "clip": TOWERS, "siglip": TOWERS,
}  # fmt: skip
MAKERS = {"deit": DeiTForImageClassification, "deit, two heads": DeiTForImageClassificationWithTeacher}
LABELS = ("cat", "dog", "owl", "eel", "bee")


def processor(size=16):
    return ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def random_vision_model(family="vit", seed=0, **changes):
    """A ``VisionModel`` of a family with random weights; ``deit, two heads`` averages two classifiers."""
    kind = family.split(", ")[0]
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    config = AutoConfig.for_model(kind, **{**FAMILIES[family], **names, **changes})
    make = MAKERS.get(family, AutoModelForImageClassification.from_config)
    torch.manual_seed(seed)
    return VisionModel.wrap(make(config).eval(), processor())


def random_images(count, seed=0, size=16):
    """uint8 images of smooth colours, so that random models tell them apart."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return list(coarse.repeat(size // 4, 1).repeat(size // 4, 2))
