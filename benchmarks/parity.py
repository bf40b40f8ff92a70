"""Compare every shipped recipe, and the evaluation, with numbers recorded from the official code.

    python benchmarks/parity.py --golden DIR
    python benchmarks/parity.py --evaluation FILE --counterfact FILE --zsre FILE [--model smollm2-135m]

DIR holds ``requests.json`` and ``tiny/``: per architecture a model folder, ``<arch>_golden.json`` (hyperparameters,
contexts, batches) and ``<arch>_golden.safetensors`` (second moments, target values, weight changes). Methods of more
parts have folders of their own, ``alphaedit_plus/``, ``hse/`` and ``memory/`` (``parity_<name>.py``). Runs in the
recorded type (float64), through the public API. Exits 1 if a relative error (Frobenius norm) is above its bar, or
nothing was compared.

The evaluation FILE holds, by case, the likelihoods and correctness flags of every CounterFact prompt, the flag of every
zsRE token, and the n-gram entropy of some texts (``recording.py``); the other two hold the records. Exits 1 if a mean
negative log-likelihood is off by more than 1e-4, or any flag differs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from recording import compare as compare_evaluation
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from cakeflow import Contexts, Editor, Statistics, read_requests
from cakeflow.core import shipped
from cakeflow.models import Site

BARS = {"gpt2": (1e-10, 1e-6), "llama": (1e-5, 1e-4)}
"""Architecture -> bars for target values and weight changes; the official norms and softmax of llama run in float32.

The official code of the MEMIT family rounds each weight change to float32, so target values that it found on weights
edited already (second batch, second boundary layer) are only as exact as that change, and are held to its bar.
"""
DEFAULT_BARS = (1e-5, 1e-4)

RECORDINGS = {
    "memit": ["memit"],
    "memit_seq": ["memit_seq"],
    "memit_blue": ["memit_blue"],
    "alphaedit": ["alphaedit", "alphaedit_seq"],
    "alphaedit_blue": ["alphaedit_blue"],
    "cake_paper": ["alphaedit", "alphaedit_seq"],
    "pmet": ["pmet"],
    "pmet_seq": ["pmet_seq"],
    "rect": ["rect"],
    "rome_official": ["rome"],
}
"""Recipe -> recordings it must reproduce. CAKE has no official code to record: with tau -> infinity its
paper's form is AlphaEdit."""

FURTHER = ("alphaedit_plus", "hse", "memory")
"""Folders of DIR with recordings of another form; ``parity_<name>.py`` compares each."""


@dataclass(frozen=True)
class Golden:
    """One architecture's recording."""

    name: str
    folder: Path
    setup: dict[str, Any]
    tensors: dict[str, Tensor]
    methods: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Golden:
        """Read ``<arch>_golden.json`` and the tensors beside it."""
        methods = json.loads(path.read_text())
        name = path.name.removesuffix("_golden.json")
        return cls(name, path.parent, methods.pop("_setup"), load_file(path.with_suffix(".safetensors")), methods)


def overrides(golden: Golden, recipe: str, layers: list[int]) -> dict[str, Any]:
    """The recording's hyperparameters as arguments of ``Editor.from_pretrained``."""
    h, templates = golden.setup["hyperparameters"], golden.setup["context_templates"]
    if recipe.startswith("rome"):  # ROME's mean key counts all contexts alike
        h, contexts = h | golden.methods["rome"], Contexts((tuple(templates),))
    else:
        contexts = Contexts.of(templates)
    values: dict[str, Any] = {
        "layers": layers,
        "contexts": contexts,
        "targets": {
            "steps": h["v_num_grad_steps"], "lr": h["v_lr"], "clamp": h["clamp_norm_factor"],
            "essence": {"factor": h["kl_factor"]}, "decay": {"factor": h["v_weight_decay"]},
        },
        "statistics": Statistics(cov_weight=h["mom2_update_weight"]),
        "moments": {layer: golden.tensors[f"covariance/{layer}"] for layer in layers},
    }  # fmt: skip
    if recipe.startswith(("alphaedit", "cake")):
        inner = {"class_path": "LeastSquares", "init_args": {"ridge": h["L2"]}}
        null_space = {"threshold": h["nullspace_threshold"], "inner": inner}
        values["solver"] = {"class_path": "NullSpace", "init_args": null_space}
    if recipe == "cake_paper":
        scores = {layer: 0.1 * layer for layer in layers}
        values["weighter"] = {"class_path": "Scores", "init_args": {"scores": scores, "tau": float("inf")}}
    return values


def compare(golden: Golden, recipe: str, recording: str, requests: list[Any]) -> dict[str, float]:
    """Largest relative error of the target values found first, of those found on edited weights, and of a change."""
    model = AutoModelForCausalLM.from_pretrained(
        golden.folder / golden.name, dtype=getattr(torch, golden.setup["dtype"])
    )
    tokenizer = AutoTokenizer.from_pretrained(golden.folder / "tokenizer")
    layers = golden.methods[recording]["layers"]
    quiet = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    editor = Editor.from_pretrained(
        model, recipe, tokenizer=tokenizer, trainer=quiet, **overrides(golden, recipe, layers)
    )
    requests = requests[: golden.methods[recording].get("requests_used")]
    sizes = golden.setup["batches_for_sequential"] if recording.endswith("_seq") else [len(requests)]
    before = {layer: editor.module.lm.oriented(Site(layer, "mlp_out")).clone() for layer in layers}
    recorded = {
        layer: golden.tensors[f"{recording}/z/{layer}"].split(sizes)
        for layer in layers
        if f"{recording}/z/{layer}" in golden.tensors
    }
    z = []
    for number, size in enumerate(sizes):
        start = sum(sizes[:number])
        editor.fit(requests[start : start + size], evaluate=False)
        ours = editor.journal[-1].values
        z += [error(values, recorded[layer][number]) for layer, values in ours.items() if layer in recorded]
    changes = {layer: editor.module.lm.oriented(Site(layer, "mlp_out")) - before[layer] for layer in layers}
    delta = [error(change, golden.tensors[f"{recording}/delta/{layer}"]) for layer, change in changes.items()]
    return {"z": max(z[:1], default=0.0), "z_later": max(z[1:], default=0.0), "delta": max(delta)}


def error(got: Tensor, want: Tensor | None) -> float:
    """Relative Frobenius error; infinite where shapes differ, a number is not finite or nothing was recorded."""
    if want is None or got.shape != want.shape:
        return float("inf")
    relative = float((got - want).norm() / want.norm())
    return relative if math.isfinite(relative) else float("inf")


def worst_of(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The largest figure of each name; infinite where one is not a number."""
    worst: dict[str, float] = {}
    for name, value in pairs:
        worst[name] = max(worst.get(name, 0.0), value if math.isfinite(value) else math.inf)
    return worst


def main() -> int:
    """Compare everything that is recorded; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--golden", type=Path)
    asked.add_argument("--evaluation", type=Path)
    parser.add_argument("--counterfact", type=Path, help="records of the evaluation")
    parser.add_argument("--zsre", type=Path, help="records of the evaluation, MEND's schema")
    parser.add_argument("--model", default="smollm2-135m", help="the model that was evaluated")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    figures, failed = compare_evaluation(args) if args.evaluation else compare_methods(args)
    if not figures:
        print("nothing to compare")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    return int(failed)


def compare_methods(args: argparse.Namespace) -> tuple[dict[str, dict[str, float]], bool]:
    """Figures of every recipe that is recorded, and whether one is above its bar or nothing was compared."""
    requests = read_requests(args.golden / "requests.json")
    figures: dict[str, dict[str, float]] = {}
    failed = False
    for path in sorted((args.golden / "tiny").glob("*_golden.json")):
        golden = Golden.read(path)
        for recipe in shipped("method"):
            for recording in RECORDINGS.get(recipe, []):
                if recording not in golden.methods:
                    continue
                worst = compare(golden, recipe, recording, requests)
                z_bar, delta_bar = BARS.get(golden.name, DEFAULT_BARS)
                later_bar = z_bar if recording.startswith("alphaedit") else delta_bar
                bars = {"z": z_bar, "z_later": later_bar, "delta": delta_bar}
                bad = not all(worst[name] <= bar for name, bar in bars.items())
                failed |= bad
                figures[f"{golden.name}/{recipe}/{recording}"] = worst
                shown = "  ".join(f"{name} {value:.1e}" for name, value in worst.items())
                print(f"{golden.name:8s} {recipe:15s} as {recording:15s} {shown}{'  ABOVE THE BAR' if bad else ''}")
    if figures:
        print("worst " + ", ".join(f"{name} {max(f[name] for f in figures.values()):.1e}" for name in bars))
    for further in [name for name in FURTHER if (args.golden / name).is_dir()]:
        more, bad = import_module(f"parity_{further}").compare(args.golden / further, args.golden)
        figures, failed = figures | more, failed | bad
    return figures, failed or not figures


if __name__ == "__main__":
    sys.exit(main())
