"""Time the collection of second moments: all layers in one pass, against one pass per layer as in the official code.

    python benchmarks/bench_statistics.py [--tokens 8192] [--json FILE]

Ours is ``Statistics.collect`` with an empty cache, reading the corpus and writing the files included, without the
eigenbases (the official code has none at this point). The reference is ``layer_stats``: per layer a pass over the same
windows that stops at the layer, and float32 sums. ``full_forward`` is against passes that go on to the logits, as a
collection without such a stop does. ``forward`` is against one pass of ours that stops where the collection does and
keeps nothing, from tokens in memory. Text: the prompts and reference texts of the built-in facts.
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
from cakeflow.data import builtin_facts, read_texts
from cakeflow.forward import token_stream
from cakeflow.models import LanguageModel, Site, capture, load_model
from cakeflow.solvers import Covariance

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


@torch.no_grad()
def forward(lm: LanguageModel, windows: Tensor, rows: int) -> None:
    """One pass up to the last layer's keys, which are not used."""
    for batch in windows.split(rows):
        with capture(lm, [Site(LAYERS[-1], "mlp_out")], side="in", stop=True):
            lm(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False)


def one_pass(lm: LanguageModel, settings: Statistics) -> Moments:
    """All layers at once."""
    sites = [Site(layer, "mlp_out") for layer in LAYERS]
    width = max(map(lm.key_width, sites))
    no_basis = torch.zeros(width), torch.zeros(width, width).T
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(Covariance, "eigen", no_basis):
        collected = settings.collect(lm, sites, Path(folder))
        return {site.layer: covariance.moment.clone() for site, covariance in collected.items()}


def difference(got: Moments, want: Moments) -> float:
    """Largest relative Frobenius error of a layer."""
    return max(float((got[layer] - want[layer]).norm() / want[layer].norm()) for layer in LAYERS)


def corpus(path: Path) -> list[str]:
    """Write the built-in facts, one text a line, and return them as they are read again."""
    facts = builtin_facts()
    texts = [probe.prompt for fact in facts for probe in fact.probes] + [fact.reference or "" for fact in facts]
    path.write_text("\n".join(dict.fromkeys(texts)), encoding="utf-8")
    return list(read_texts(path))


def main() -> int:
    """Collect both ways; the exit status."""
    args_of = parser(__doc__, repeats=3)
    args_of.add_argument("--tokens", type=int, default=8192)
    args_of.add_argument("--window", type=int, default=512)
    args_of.add_argument("--rows", type=int, default=8, help="windows in a forward pass")
    args = args_of.parse_args()
    torch.set_num_threads(args.threads)
    lm = load_model("smollm2-135m", dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        stream = token_stream(lm, corpus(path), args.tokens)
        windows = torch.tensor(stream[: len(stream) // args.window * args.window]).unflatten(0, (-1, args.window))
        print(f"{windows.numel()} tokens in windows of {windows.shape[1]}, layers {LAYERS}")
        settings = Statistics(path, args.tokens, args.window, batch_tokens=args.rows * args.window)
        # a pass that keeps nothing has nothing to compare
        result = alternate(
            lambda _number: one_pass(lm, settings),
            lambda _number: forward(lm, windows, args.rows),
            lambda *_: 0.0,
            args.repeats,
            0.0,
        )
        figures = {"forward": replace(result, notes={"tokens per second": windows.numel() / result.ours})}
        ways = {
            "layer_stats": (lambda _number: per_layer(lm, windows, args.rows, stop=True), args.repeats),
            "full_forward": (lambda _number: per_layer(lm, windows, args.rows, stop=False), 1),
        }
        for name, (reference, repeats) in ways.items():
            result = alternate(lambda _number: one_pass(lm, settings), reference, difference, repeats, TOLERANCE)
            figures[name] = replace(result, notes={"tokens per second": windows.numel() / result.ours})
    return report(figures, args.json)


if __name__ == "__main__":
    sys.exit(main())
