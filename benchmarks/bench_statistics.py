"""Time the collection of second moments: all layers in one pass, against one pass per layer as in the official code.

    python benchmarks/bench_statistics.py [--tokens 8192] [--json FILE]

Ours is what ``Statistics.collect`` runs when nothing is cached, without the eigenbases (the official code has none at
this point). The reference is ``layer_stats``: per layer a pass over the same windows that stops at the layer, and
float32 sums. ``full_forward`` is against passes that go on to the logits, as a collection without such a stop does.
Text: the prompts and reference texts of the built-in facts.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from paired import alternate, parser, report
from torch import Tensor

from cakeflow import Statistics
from cakeflow.core import statistics as collector
from cakeflow.data import builtin_facts
from cakeflow.models.architecture import Site
from cakeflow.models.language import LanguageModel
from cakeflow.models.loading import load_model

LAYERS = [9, 10, 11, 12, 13]
TOLERANCE = 1e-6

Moments = dict[int, Tensor]


class _StopError(Exception):
    """Ends a forward pass."""


@torch.no_grad()
def per_layer(lm: LanguageModel, windows: Tensor, rows: int, stop: bool) -> Moments:
    """One pass per layer, the official way."""
    moments = {}
    for layer in LAYERS:
        width = lm.oriented(Site(layer, "mlp_out")).shape[1]
        total = torch.zeros(width, width)

        def add(_module: object, inputs: tuple[Tensor, ...], _output: Tensor, total: Tensor = total) -> None:
            keys = inputs[0].flatten(0, 1)
            total += keys.T @ keys
            if stop:
                raise _StopError

        handle = lm.module(Site(layer, "mlp_out")).register_forward_hook(add)
        for batch in windows.split(rows):
            try:
                lm.model(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False)
            except _StopError:
                continue
        handle.remove()
        moments[layer] = total / windows.numel()
    return moments


def one_pass(lm: LanguageModel, windows: Tensor, rows: int) -> Moments:
    """All layers at once."""
    moments: Moments = {}

    def keep(path: Path, moment: Tensor, _half: Tensor) -> None:
        moments[int(path.stem.removeprefix("layer-"))] = moment

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(collector, "_finish", keep):
        collector._collect(lm, LAYERS, windows, Path(folder), rows)
    return moments


def difference(got: Moments, want: Moments) -> float:
    """Largest relative Frobenius error of a layer."""
    return max(float((got[layer] - want[layer]).norm() / want[layer].norm()) for layer in LAYERS)


def windows_of(lm: LanguageModel, tokens: int, window: int) -> Tensor:
    """The built-in facts as rows of tokens."""
    facts = builtin_facts()
    texts = [probe.prompt for fact in facts for probe in fact.probes] + [fact.reference or "" for fact in facts]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        path.write_text("\n".join(dict.fromkeys(texts)), encoding="utf-8")
        return Statistics(source=path, tokens=tokens, window=window)._windows(lm)


def main() -> int:
    """Collect both ways; the exit status."""
    args_of = parser(__doc__, repeats=3)
    args_of.add_argument("--tokens", type=int, default=8192)
    args_of.add_argument("--window", type=int, default=512)
    args_of.add_argument("--rows", type=int, default=8, help="windows in a forward pass")
    args = args_of.parse_args()
    torch.set_num_threads(args.threads)
    lm = load_model("smollm2-135m", dtype="float32")
    windows = windows_of(lm, args.tokens, args.window)
    print(f"{windows.numel()} tokens in windows of {windows.shape[1]}, layers {LAYERS}")
    figures = {}
    for name, stop, repeats in (("layer_stats", True, args.repeats), ("full_forward", False, 1)):
        found = alternate(
            lambda _number: one_pass(lm, windows, args.rows),
            lambda _number, stop=stop: per_layer(lm, windows, args.rows, stop),
            difference,
            repeats,
            TOLERANCE,
        )
        figures[name] = replace(found, notes={"tokens per second": windows.numel() / found.ours})
    return report(figures, args.json)


if __name__ == "__main__":
    sys.exit(main())
