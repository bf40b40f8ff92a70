"""Time the collection of second moments: all layers in one pass, against one pass per layer as in the official code.

    python benchmarks/bench_statistics.py [--tokens 8192] [--threads 1] [--json FILE]
    python benchmarks/bench_statistics.py --documents 1000 10000

Ours is ``Statistics.collect`` with an empty cache, reading the corpus and writing the files included, without the
eigenbases (the official code has none at this point). The reference is ``layer_stats``: per layer a pass over the same
windows that stops at the layer, and float32 sums. ``full_forward`` is against passes that go on to the logits, as a
collection without such a stop does. ``forward`` is against one pass of ours that stops where the collection does and
keeps nothing, from tokens in memory. ``exact_sum`` is what the exact sums of one pass's terms take, against a sum in
float64 and, as a note, against the pass. Text: the prompts and reference texts of the built-in facts.

``--documents`` instead collects from so many synthetic documents of 128 tokens with a tiny model, each number in a
process of its own, and shows the peak of its memory but for what is mapped from files, less that before it began.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from paired import Figures, alternate, parser, report
from torch import Tensor

from cakeflow import Statistics
from cakeflow.data import builtin_facts, read_texts
from cakeflow.forward import token_stream
from cakeflow.models import LanguageModel, Site, capture, gram, load_model
from cakeflow.solvers import Covariance, ExactSum

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


def terms_of(lm: LanguageModel, batch: Tensor) -> list[Tensor]:
    """Return K^T K of one forward pass for every layer."""
    sites = [Site(layer, "mlp_out") for layer in LAYERS]
    with torch.no_grad(), capture(lm, sites, side="in", stop=True) as inputs:
        lm(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False)
    return [gram(inputs[site].flatten(0, 1)) for site in sites]


def exact(lm: LanguageModel, batch: Tensor, repeats: int) -> Figures:
    """Exact sums of one pass's terms against sums in float64."""
    terms = terms_of(lm, batch)
    sums = [ExactSum.zeros(len(term)) for term in terms]
    plain = [torch.zeros_like(term, dtype=torch.float64) for term in terms]

    def ours(_number: int) -> list[Tensor]:
        for total, term in zip(sums, terms, strict=True):
            total.add(term)
        return terms

    def reference(_number: int) -> list[Tensor]:
        return [total.add_(term) for total, term in zip(plain, terms, strict=True)]

    result = alternate(ours, reference, lambda *_: 0.0, repeats, 1e-15)
    passes = alternate(ours, lambda _number: forward(lm, batch, len(batch)), lambda *_: 0.0, repeats, 0.0)
    values = [total.value() / total.count for total in sums]
    error = max(float((value - term).norm() / term.norm()) for value, term in zip(values, terms, strict=True))
    return replace(result, error=error, notes={"share of the pass": passes.ours / passes.reference})


DOCUMENTS = """
import sys, tempfile, threading, time
from pathlib import Path
from cakeflow import Statistics
from cakeflow.models import Site
from cakeflow.testing import tiny_model

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

def watch():
    while True:
        peaks.append(anonymous())
        time.sleep(0.002)

documents = int(sys.argv[1])
texts = ({"text": "".join(f" {(i + 7 * j) % 1000:03d}" for j in range(32))} for i in range(documents))
lm, sites = tiny_model(), [Site(1, "mlp_out")]
with tempfile.TemporaryDirectory() as folder:
    Statistics([{"text": " 123" * 2500}], tokens=10_000, window=128).collect(lm, sites, Path(folder))
    before, peaks = anonymous(), []
    threading.Thread(target=watch, daemon=True).start()
    Statistics(texts, tokens=128 * documents, window=128).collect(lm, sites, Path(folder))
    print(max(peaks) - before)
"""


def memory(documents: int) -> float:
    """Peak memory in MiB of a collection from so many documents, in a process of its own (Linux)."""
    done = subprocess.run(
        [sys.executable, "-c", DOCUMENTS, str(documents)], check=True, stdout=subprocess.PIPE, text=True
    )
    return float(done.stdout.split()[-1])


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
    args_of.add_argument("--documents", type=int, nargs="+", help="numbers of documents whose memory is measured")
    args_of.add_argument("--sums", action="store_true", help="nothing but exact_sum")
    args = args_of.parse_args()
    if args.documents:
        for count in args.documents:
            print(f"{count} documents: {memory(count):.1f} MiB")
        return 0
    torch.set_num_threads(args.threads)
    lm = load_model("smollm2-135m", dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        stream = token_stream(lm, corpus(path), args.tokens)
        windows = torch.tensor(stream[: len(stream) // args.window * args.window]).unflatten(0, (-1, args.window))
        print(f"{windows.numel()} tokens in windows of {windows.shape[1]}, layers {LAYERS}")
        settings = Statistics(path, args.tokens, args.window, batch_tokens=args.rows * args.window)
        sums = {"exact_sum": exact(lm, windows[: args.rows], max(args.repeats, 3))}
        if args.sums:
            return report(sums, args.json)
        # a pass that keeps nothing has nothing to compare
        result = alternate(
            lambda _number: one_pass(lm, settings),
            lambda _number: forward(lm, windows, args.rows),
            lambda *_: 0.0,
            args.repeats,
            0.0,
        )
        figures = {"forward": replace(result, notes={"tokens per second": windows.numel() / result.ours}), **sums}
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
