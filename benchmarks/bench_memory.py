"""Peak memory of one batch of edits, per recipe: measured on SmolLM2, estimated by shape for the models of the papers.

    python benchmarks/bench_memory.py [--facts 100] [--recipes alphaedit memit ...] [--budgets 1 0.5] [--json FILE]
    python benchmarks/bench_memory.py --recipes --budgets          # estimated only

Every recipe is run in a process of its own (``LocateThenEdit.peaks``; two steps per target value, which is when the
peak is reached). Columns are the phases' peaks in GiB beyond the model, then their maximum, what
``LocateThenEdit.estimate`` said before the edit, and the whole, model included, as in table 11 of CAKE's paper. A row
per budget runs ``alphaedit`` within that many GiB. The estimated rows take each model's shape on the meta device, the
facts as SmolLM2's tokenizer cuts them, and the layers of the shipped model config.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from cakeflow import Editor, EditRequest
from cakeflow.core import Footprint, find_config
from cakeflow.data import builtin_facts
from cakeflow.forward import GIB, encode_batch, generate_contexts
from cakeflow.models import LanguageModel, Site, load_model

RECIPES = ["alphaedit", "cake", "memit", "pmet", "rect", "prune", "rome", "emmet", "alphaedit_blue", "ft"]
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2-xl": {"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25},
    "gpt-j-6b": {"model_type": "gptj", "n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64},
    "llama-3-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
"""What the published configs say of each model's shape."""
PHASES = ("statistics", "targets", "keys", "allocate", "solve")


def facts(count: int) -> list[EditRequest]:
    """The built-in facts, over and over: subjects of the right length are all that matters here."""
    known = builtin_facts()
    return [known[i % len(known)] for i in range(count)]


def measure(recipe: str, count: int, budget: float | None) -> dict[str, float]:
    """Edit SmolLM2 in this process; bytes by phase."""
    trainer = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    editor = Editor.from_pretrained("smollm2-135m", recipe, memory_budget=budget, trainer=trainer)
    module = editor.module
    module.targets = replace(module.targets, steps=2)
    module.contexts = generate_contexts(module.lm)
    batch = encode_batch(module.lm, facts(count), module.contexts)
    estimated = module.estimate(batch).peak
    run = editor.fit(facts(count), evaluate=False)
    model = sum(parameter.nbytes for parameter in editor.model.parameters())
    return {**run.peaks, "estimated": float(estimated), "model": float(model)}


def elsewhere(recipe: str, count: int, budget: float | None) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--one", recipe, "--facts", str(count)]
    command += ["--budgets", str(budget)] if budget else ["--budgets"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def line(name: str, peaks: dict[str, float]) -> str:
    """A row of the measured table."""
    phases = "".join(f"{peaks.get(phase, 0) / GIB:12.2f}" for phase in PHASES)
    peak = max(peaks.get(phase, 0) for phase in PHASES)
    whole = (peak + peaks["model"]) / GIB
    return f"{name:30s}{phases}{peak / GIB:10.2f}{peaks['estimated'] / GIB:10.2f}{whole:10.2f}"


def shaped(name: str, dtype: torch.dtype, tokenizer: Any) -> LanguageModel:
    """A model without numbers."""
    shape = dict(SHAPES[name])
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    with torch.device("meta"):
        return LanguageModel.wrap(AutoModelForCausalLM.from_config(config, dtype=dtype), tokenizer)


def estimate(count: int) -> dict[str, dict[str, float]]:
    """Every model by type and budget."""
    small = load_model("smollm2-135m")
    contexts = generate_contexts(small)
    rows = {}
    for name in SHAPES:
        layers = yaml.safe_load(find_config("model", name).read_text())["model"]["layers"]
        for dtype in (torch.float32, torch.bfloat16):
            lm = shaped(name, dtype, small.tokenizer)
            batch, sites = encode_batch(lm, facts(count), contexts), [Site(layer, "mlp_out") for layer in layers]
            for budget in (None, 4.0):
                size = Footprint.estimate(lm, batch, sites, max_tokens=1024, max_bytes=budget and budget * GIB)
                model = sum(parameter.nbytes for parameter in lm.model.parameters())
                key = f"{name}, {str(dtype)[6:]}, {f'{budget:g} GiB' if budget else 'no budget'}"
                rows[key] = {**vars(size), "peak": size.peak, "model": model}
    return rows


def main() -> None:
    """Measure, estimate, print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--facts", type=int, default=100)
    options.add_argument("--recipes", nargs="*", default=RECIPES)
    options.add_argument("--budgets", nargs="*", type=float, default=[1.0, 0.5])
    options.add_argument("--json", type=Path)
    options.add_argument("--one", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.facts, next(iter(args.budgets), None))))
        return
    rows: dict[str, Any] = {}
    print(f"SmolLM2-135M, {args.facts} facts, GiB\n{'recipe':30s}" + "".join(f"{name:>12s}" for name in PHASES), end="")
    print(f"{'peak':>10s}{'estimated':>10s}{'whole':>10s}")
    cases = [(recipe, None) for recipe in args.recipes] + [(RECIPES[0], budget) for budget in args.budgets]
    for recipe, budget in cases:
        name = recipe if budget is None else f"{recipe}, {budget:g} GiB at most"
        rows[name] = elsewhere(recipe, args.facts, budget)
        print(line(name, rows[name]), flush=True)
    columns = ("stored", "keys", "targets", "solve", "peak", "whole", "facts", "tokens")
    print(f"\nestimated, {args.facts} facts, GiB\n{'model':36s}" + "".join(f"{name:>8s}" for name in columns))
    for name, row in estimate(args.facts).items():
        rows[name] = row
        sizes = [row[part] / GIB for part in ("stored", "keys", "targets", "solve", "peak")]
        sizes.append((row["peak"] + row["model"]) / GIB)
        counts = "".join(f"{row[part]:8.0f}" for part in ("facts", "suffix_tokens"))
        print(f"{name:36s}" + "".join(f"{size:8.2f}" for size in sizes) + counts, flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
