"""Edits on a GPU: the same weights as on the CPU, and seconds and memory of a large model's shape.

    python benchmarks/bench_gpu.py [--facts 100] [--methods memit cake] [--profile] [--json FILE]
    python benchmarks/bench_gpu.py --recipes --methods --attention

First a small random model is edited in float64 on the CPU and on the GPU by each recipe; the exit status is 1 if a
change differs by more than 1e-9 of its norm. Then a model of random weights in bfloat16, of the shape that ``--shape``
names, gets built-in facts in one batch: seconds and GiB by phase. Its second moments have random eigenvalues, so no
time is spent on a corpus; no search ends before its last step, as nothing is learned from random weights so early.
``--attention`` times searches in that model by torch's choice of attention, which is cuDNN's, and without it.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bench_memory import SHAPES, facts
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from cakeflow import Contexts, Editor
from cakeflow.forward import GIB, encode_batch
from cakeflow.models import LanguageModel, Site, load_model
from cakeflow.solvers import Covariance
from cakeflow.targets import GradientSearch, LossBelow

CONTEXTS = Contexts.of(["{}", "The first thing you need to do is. {}", "I am a student in the field of. {}"])
RECIPES = ("cake", "cake_paper", "alphaedit", "memit", "memit_seq_blue", "pmet", "rome", "emmet", "rect")
TINY: dict[str, Any] = {"n_embd": 64, "n_inner": 160, "n_layer": 6, "n_head": 4}
"""A GPT-2, because rotary positions are float32 in models of any type, and the CPU's cosines are not the GPU's."""
TOLERANCE = 1e-9
QUIET = {"logger": False, "enable_progress_bar": False}


def covariance(width: int, device: str, settings: Any) -> Covariance:
    """A second moment with a known eigenbasis: a reflection, so that nothing has to be factored."""
    generator = torch.Generator().manual_seed(0)
    values = 1e-4 + torch.rand(width, generator=generator, dtype=torch.float64).pow(8).sort().values.to(device)
    normal = torch.randn(width, generator=generator, dtype=torch.float64).to(device)
    normal /= normal.norm()
    vectors = torch.eye(width, dtype=torch.float64, device=device) - 2 * torch.outer(normal, normal)
    return settings.covariance((vectors * values) @ vectors.T, (values, vectors))  # type: ignore[no-any-return]


def changes(method: str, device: str, tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """The weight changes of one batch on the small model."""
    torch.manual_seed(0)
    shape = {**TINY, "vocab_size": len(tokenizer), "initializer_range": 0.1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **shape), dtype=torch.float64).eval()
    layers, trainer = [2] if method == "rome" else [2, 3], {**QUIET, "accelerator": device}
    editor = Editor.from_pretrained(
        model, method, tokenizer=tokenizer, layers=layers, contexts=CONTEXTS, targets={"steps": 6}, rounds=0,
        scores={2: 0.4, 3: 0.6}, trainer=trainer,
    )  # fmt: skip
    module = editor.module
    module.covariances = {layer: covariance(160, "cpu", module.statistics) for layer in layers}
    before = {layer: module.lm.oriented(Site(layer, "mlp_out")).cpu().clone() for layer in layers}
    editor.fit(facts(8), evaluate=False)
    return [module.lm.oriented(Site(layer, "mlp_out")).cpu() - before[layer] for layer in layers]


def shaped(name: str, device: str, tokenizer: PreTrainedTokenizerBase) -> LanguageModel:
    """A random model in bfloat16."""
    shape = dict(SHAPES[name])
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    with torch.device(device):
        return LanguageModel.wrap(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval(), tokenizer)


def edit(lm: LanguageModel, method: str, device: str, count: int, layers: list[int]) -> dict[str, float]:
    """Edit some facts in one batch, and take them back; seconds and GiB by phase."""
    trainer = {**QUIET, "accelerator": device}
    editor = Editor.from_pretrained(
        lm.model, method, tokenizer=lm.tokenizer, layers=layers, contexts=CONTEXTS, trainer=trainer, rounds=0
    )
    module = editor.module
    shared = covariance(lm.key_width(Site(layers[0], "mlp_out")), device, module.statistics)
    module.covariances = dict.fromkeys(layers, shared)
    module.weighter = module.weighter.with_scores(dict.fromkeys(layers, 0.5))
    module.targets = replace(module.targets, stop=replace(module.targets.stop, loss=0.0))
    gc.collect()  # of an earlier method's editor
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    editor.fit(facts(count), evaluate=False)
    figures = {"seconds": time.perf_counter() - start, **{f"{name}, s": each for name, each in module.timings.items()}}
    figures |= {f"{name}, GiB": each / GIB for name, each in module.peaks.items()}
    if device == "cuda":
        figures["with the model, GiB"] = torch.cuda.max_memory_allocated() / GIB
    editor.rollback(1)
    return figures


def attention(lm: LanguageModel, count: int, layer: int) -> dict[str, dict[str, float]]:
    """Seconds of a search of two steps, first and again, and of a further step, by torch's choice and without cuDNN."""
    search = GradientSearch(stop=LossBelow(0.0))
    batch, rows = encode_batch(lm, facts(count), CONTEXTS), {}

    def seconds(steps: int) -> float:
        start = time.perf_counter()
        replace(search, steps=steps).search(lm, batch, layer)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    search.search(lm, encode_batch(lm, facts(2), CONTEXTS), layer)  # warms up, at shapes that do not come again
    theirs = mock.patch("cakeflow.models.base.without_cudnn_attention", nullcontext)
    for name, choice in (("torch's choice", theirs), ("without cuDNN", nullcontext())):
        with choice:
            first, two, seven = seconds(2), seconds(2), seconds(7)
        rows[name] = {"first two steps": first, "again": two, "a step": (seven - two) / 5}
    return rows


def main() -> int:
    """Compare, time, print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda")
    options.add_argument("--shape", default="llama-3-8b", choices=SHAPES)
    options.add_argument("--layers", type=int, nargs="+", default=[4, 5, 6, 7, 8])
    options.add_argument("--facts", type=int, default=100)
    options.add_argument("--recipes", nargs="*", default=RECIPES, help="compared on the small model")
    options.add_argument("--methods", nargs="*", default=["memit", "alphaedit", "cake"], help="timed on the large one")
    options.add_argument("--attention", action="store_true", help="time attention by cuDNN and without")
    options.add_argument("--profile", action="store_true", help="print the kernels of the last method's run")
    options.add_argument("--json", type=Path)
    args = options.parse_args()
    tokenizer = load_model("smollm2-135m").tokenizer
    rows: dict[str, Any] = {"device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu"}
    worst = 0.0
    for method in args.recipes:
        pairs = zip(changes(method, "cpu", tokenizer), changes(method, args.device, tokenizer), strict=True)
        worst = max(worst, *(float((ours - theirs).norm() / theirs.norm()) for theirs, ours in pairs))
        rows[method] = worst
        print(f"{method:16s} largest difference so far {worst:.1e}", flush=True)
    lm = shaped(args.shape, args.device, tokenizer) if args.methods or args.attention else None
    if args.attention:
        assert lm is not None
        rows["attention"] = attention(lm, args.facts, args.layers[-1])
        print(rows["attention"])
    for number, method in enumerate(args.methods):
        assert lm is not None
        if number == 0:
            edit(lm, method, args.device, 2, args.layers)  # warms up
        with (
            profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
            if args.profile
            else nullcontext() as kernels
        ):
            rows[f"{args.shape}, {method}"] = figures = edit(lm, method, args.device, args.facts, args.layers)
        print(f"{args.shape}, {method}, {args.facts} facts: ", {name: round(each, 2) for name, each in figures.items()})
        if kernels is not None:
            print(kernels.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=60))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    return int(not worst <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
