"""An image classifier made of transformer blocks, with its image processor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedConfig, PreTrainedModel

from cakeflow.errors import ArchitectureError, listed
from cakeflow.models.architecture import (
    Architecture,
    Site,
    attention_output,
    is_attention,
    is_norm,
    linear_maps,
    mlp_output,
)
from cakeflow.models.base import EditableModel
from cakeflow.models.hooks import outputs_of_blocks, read_inputs
from cakeflow.models.language import INCIDENTAL
from cakeflow.models.wrappers import unwrapped

CHANNELS = 3
"""Colour channels of an image."""
AGREE = 1e-3
"""Largest relative difference between the logits and the mean of what the classifiers give."""


def tower_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The config of the vision tower: a part of the model's where it has a text tower too."""
    config: PreTrainedConfig = getattr(model.config, "vision_config", None) or model.config
    return config


def find_vision_architecture(model: PreTrainedModel) -> tuple[Architecture, tuple[str, ...]]:
    """Find the blocks, projections and classifiers of a vision transformer from its module tree and config.

    Args:
        model: A model for image classification.

    Returns:
        The paths, and the paths of all classifiers: one, or two whose logits are averaged.

    Raises:
        ArchitectureError: If there are no blocks of one width, no attention or MLP in them, or no classifier.
    """
    stack, block = _blocks(model)
    width = int(tower_config(model).hidden_size)
    attn_out, mlp_out = attention_output(block, width), mlp_output(block, width)
    if attn_out is None or mlp_out is None:
        role = "attention" if attn_out is None else "MLP"
        raise _missing(model, f"an {role} in its blocks whose last linear map writes hidden_size = {width} values")
    classifiers = _classifiers(model, stack)
    prefix = f"{stack}.{{}}"
    norm = _final_norm(model, stack, width)
    paths = Architecture(prefix, f"{prefix}.{mlp_out}", f"{prefix}.{attn_out}", norm, classifiers[0])
    return paths, classifiers


def _missing(model: PreTrainedModel, description: str) -> ArchitectureError:
    return ArchitectureError(
        f"{type(model).__name__} (model_type {model.config.model_type!r}): could not find {description}; load a vision "
        "transformer with AutoModelForImageClassification"
    )


def _blocks(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """Return the path of the list of blocks, and its first block; blocks that lie in stages are refused."""
    lists = [(name, each) for name, each in model.named_modules() if isinstance(each, nn.ModuleList) and len(each)]
    for name, stages in lists:
        if any(isinstance(part, nn.ModuleList) and _attends(part) for stage in stages for part in stage.modules()):
            raise ArchitectureError(
                f"{type(model).__name__}: {name} holds stages of blocks, whose width, heads and tokens differ from "
                "stage to stage, so that one representation of heads does not exist; give a plain vision transformer "
                "(ViT, DeiT, DINOv2, BEiT, CLIP, SigLIP)"
            )
    depth = getattr(tower_config(model), "num_hidden_layers", None)
    stacks = [(name, each[0]) for name, each in lists if len(each) == depth and _attends(each)]
    if not stacks:
        raise _missing(model, f"a ModuleList with num_hidden_layers = {depth} blocks that have an attention")
    patches = next((name for name, each in model.named_modules() if isinstance(each, _ConvNd)), "")
    root = patches.split(".")[0]
    return next((each for each in stacks if each[0].split(".")[0] == root), stacks[0])


def _attends(blocks: nn.ModuleList) -> bool:
    return any(is_attention(part) for block in blocks for part in block.children())


def _classifiers(model: PreTrainedModel, stack: str) -> tuple[str, ...]:
    """Return the outermost linear maps outside the blocks that write one number per label."""
    labels = model.config.num_labels
    maps = [(name, each) for name, each in linear_maps(model) if not name.startswith(f"{stack}.")]
    names = [name for name, each in maps if getattr(each, "out_features", None) == labels]
    if not names:
        raise _missing(model, f"a classifier: a linear map outside {stack} with num_labels = {labels} outputs")
    outermost = min(name.count(".") for name in names)
    return tuple(name for name in names if name.count(".") == outermost)


def _final_norm(model: PreTrainedModel, stack: str, width: int) -> str:
    """Return the first norm behind the blocks, in the order of the module tree; empty if there is none."""
    names: list[str] = [name for name, _ in model.named_modules()]
    for name in names[names.index(stack) :]:
        module = model.get_submodule(name)
        outside = not name.startswith(f"{stack}.")
        if outside and is_norm(module) and _width_of(module) == width:
            return name
    return ""


def _width_of(module: nn.Module) -> int:
    return next((len(each) for each in module.parameters(recurse=False)), 0)


@dataclass(frozen=True)
class VisionModel(EditableModel):
    """A Hugging Face vision transformer that classifies images, to edit.

    What enters a classifier is called the representation of an image: whatever the model makes of its last states
    (CLS token, mean over patches, both side by side). It is read where it is used, so the way of pooling is not asked.

    Attributes:
        model: The model.
        processor: Its image processor; size, mean and standard deviation belong to the model's hash.
        architecture: Module paths; its ``head`` is the first classifier.
        classifiers: Paths of all classifiers; the logits are the mean of what they give.
        masters: See ``EditableModel``.
    """

    model: PreTrainedModel
    processor: Any
    architecture: Architecture
    classifiers: tuple[str, ...]
    masters: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def wrap(cls, model: nn.Module, processor: Any) -> VisionModel:
        """Check a model object and find its architecture.

        Args:
            model: A model for image classification, or ``torch.compile`` or ``DataParallel`` around one.
            processor: Its image processor.

        Raises:
            ArchitectureError: If modules are missing, heads do not divide the attention's width, images have not three
                channels, or the logits are not the mean of the classifiers' outputs.
            NumericalError: If a weight is not finite.
        """
        model = unwrapped(model)
        architecture, classifiers = find_vision_architecture(model)
        wrapped = cls(model, processor, architecture, classifiers)
        wrapped.require_finite()
        channels = getattr(wrapped.config, "num_channels", CHANNELS)
        if channels != CHANNELS:
            raise ArchitectureError(
                f"{wrapped.name} takes images of {channels} channels; only RGB images can be edited"
            )
        inside = wrapped.key_width(Site(0, "attn_out"))
        if inside % wrapped.heads:
            raise ArchitectureError(
                f"{architecture.attn_out.format(0)} reads {inside} values, which {wrapped.heads} heads do not divide; "
                "its heads cannot be told apart"
            )
        wrapped._check_classifiers()
        return wrapped

    @torch.no_grad()
    def _check_classifiers(self) -> None:
        with read_inputs(self, self.classifiers) as features:
            logits = self.logits(self.example)
        if silent := sorted(set(self.classifiers) - set(features)):
            raise ArchitectureError(f"{listed(silent)}: no image reaches this classifier; it cannot be edited")
        maps = [self.module(path) for path in self.classifiers]
        outputs = torch.stack([each(features[path]) for each, path in zip(maps, self.classifiers, strict=True)])
        if outputs.mean(0).shape != logits.shape or not _agree(outputs.mean(0), logits):
            raise ArchitectureError(
                f"{self.name}: its logits are not the mean of what {listed(self.classifiers)} give for one "
                "representation per image; models with another kind of head cannot be edited"
            )

    @property
    def preprocessor(self) -> Any:
        """The image processor."""
        return self.processor

    def exchanged(self, model: Any, preprocessor: Any) -> VisionModel:
        """Return another model of the same structure with its image processor."""
        return replace(self, model=model, processor=preprocessor, masters={})

    def identity(self) -> bytes:
        """Config and image processor."""
        config = {name: value for name, value in self.model.config.to_dict().items() if name not in INCIDENTAL}
        processor = {name: str(value) for name, value in self.processor.to_dict().items()}
        return json.dumps([config, processor], sort_keys=True, default=str).encode()

    @property
    def config(self) -> PreTrainedConfig:
        """Config of the vision tower."""
        return tower_config(self.model)

    @property
    def heads(self) -> int:
        """Attention heads of a block."""
        return int(self.config.num_attention_heads)

    @property
    def head_width(self) -> int:
        """Columns of the attention's output projection that one head writes to."""
        return self.key_width(Site(0, "attn_out")) // self.heads

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        names: Any = self.model.config.id2label
        return tuple(str(names.get(index, index)) for index in range(len(names)))

    @property
    def device(self) -> torch.device:
        """Device of the inputs."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.model.parameters()).dtype

    @cached_property
    def tuple_size(self) -> int:
        """Number of values that the blocks return in a tuple, 0 if they return a tensor."""
        return outputs_of_blocks(self, pixel_values=self.example)

    @property
    def example(self) -> Float[Tensor, "1 3 height width"]:
        """A grey image as the processor gives it."""
        return self.pixels([np.full((*self._size, CHANNELS), 127, np.uint8)])

    @property
    def _size(self) -> tuple[int, int]:
        size = self.config.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def noise(self, count: int) -> Float[Tensor, "n 3 height width"]:
        """Images of noise as the processor gives them, always the same: questions that need no picture.

        Args:
            count: n.
        """
        rng = np.random.default_rng(0)
        return self.pixels(list(rng.integers(0, 256, (count, *self._size, CHANNELS), dtype=np.uint8)))

    def editable(self) -> list[str]:
        """Names of the weights of all linear maps in the blocks and of the classifiers, and of attentions' biases."""
        outputs = [Site(layer, "attn_out") for layer in range(self.depth)]
        biased = [self.architecture.path(site) for site in outputs if self._bias(site) is not None]
        return [
            *super().editable(),
            *(f"{path}.weight" for path in self.classifiers),
            *(f"{path}.bias" for path in biased),
        ]

    def _bias(self, site: Site) -> Tensor | None:
        return getattr(self.module(site), "bias", None)

    def pixels(self, images: Sequence[UInt8[np.ndarray, "height width 3"]]) -> Float[Tensor, "n 3 height width"]:
        """Images as the model takes them: resized, cropped and normalised by its processor."""
        batch: Tensor = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        return batch.to(self.device, self.dtype)

    def logits(self, pixels: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n labels"]:
        """One number per image and label."""
        logits: Tensor = self(pixel_values=pixels).logits
        return logits


def _agree(values: Tensor, expected: Tensor) -> bool:
    """True if two tensors agree up to rounding."""
    scale = expected.double().norm().clamp_min(torch.finfo(torch.float32).tiny)
    return bool((values.double() - expected.double()).norm() <= AGREE * scale + AGREE)
