"""Time the target search against the official way of finding target values.

    python benchmarks/bench_targets.py [--dtype bfloat16] [--reference 6] [--json FILE]

Both sides find target values for the same requests and contexts in the same process. The reference is a plain loop:
one request at a time, every block, every position, all logits (twice, as in the official code: once inside the model
for the KL term, once for the loss). Prints seconds per request, counted floating-point operations and the share of the
matrix product rate measured here, and compares the outcome. ``ratio`` is reference time over ours, per request; with
``--reference N`` only the first N requests are done the official way.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cakeflow import Contexts, GradientSearch
from cakeflow.data import builtin_facts
from cakeflow.forward import TextBatch, encode_batch
from cakeflow.models import LanguageModel, Site, has_fast_products, load_model, product
from cakeflow.targets import Targets

CONTEXTS = Contexts.of(
    [
        "{}",
        "The first thing you need to do is. {}",
        "Therefore, the answer is not that. {}",
        "Because of the high cost of living in. {}",
        "I am a student in the field of. {}",
        "You can use the following steps to create. {}",
    ]
)


def reference(
    lm: LanguageModel, batch: TextBatch, index: int, layer: int, settings: GradientSearch
) -> tuple[Tensor, float, int]:
    """One request, the official way: value, loss and number of evaluations."""
    rows = [*(row.ids[:-1] for row in batch.rows[index]), batch.essence[index].ids]
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    labels = torch.full_like(ids[:-1], -100)
    for i, row in enumerate(batch.rows[index]):
        labels[i, row.target - 1 : len(row.ids) - 1] = torch.tensor(row.ids[row.target :])
    at = torch.tensor([row.subject for row in (*batch.rows[index], batch.essence[index])])
    every = torch.arange(len(rows))
    block, final_norm = lm.model.model.layers[layer], lm.model.model.norm
    delta = torch.zeros(lm.model.config.hidden_size, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=settings.lr)
    initial: list[Tensor] = []
    last: list[Tensor] = []

    def add(_module: object, _args: object, output: Tensor) -> Tensor:
        if not initial:
            initial.append(output[0, at[0]].detach().float())
        changed = output.clone()
        changed[every, at] += delta.to(output.dtype)
        return changed

    handles = [
        block.register_forward_hook(add),
        lm.model.model.layers[-1].register_forward_hook(lambda _m, _a, out: last.append(out)),
    ]
    before: Tensor | None = None
    try:
        for step in range(settings.steps):
            last.clear()
            logits = lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            now = logits[-1, at[-1]].float().log_softmax(-1)
            before = now.detach().clone() if before is None else before
            scores = lm.head(final_norm(last[0]))[:-1].float().log_softmax(-1)
            picked = scores.gather(2, labels.clamp_min(0)[..., None])[..., 0] * (labels >= 0)
            nll = -(picked.sum(1) / (labels >= 0).sum(1)).mean()
            kl = settings.essence.factor * (now.exp() * (now - before)).sum()
            decay = settings.decay.factor * delta.norm() / initial[0].norm() ** 2
            loss = nll + kl + decay
            if loss < settings.stop.loss or step == settings.steps - 1:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
            with torch.no_grad():
                radius = settings.clamp * initial[0].norm()
                if delta.norm() > radius:
                    delta.mul_(radius / delta.norm())
    finally:
        for handle in handles:
            handle.remove()
    return (initial[0] + delta.detach()).double(), float(loss.detach()), step + 1


def counted(run: Callable[[], object]) -> float:
    """Floating-point operations of a call; torch's counter does not know oneDNN's kernel by itself."""
    kernel = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    with FlopCounterMode(display=False, custom_mapping={kernel: _of_product} if kernel else {}) as counter:
        run()
    return float(counter.get_total_flops())


def _of_product(x: torch.Size, weight: torch.Size, *_args: object, **_kwargs: object) -> int:
    return 2 * x.numel() * weight[0]


def gemm_rate(
    lm: LanguageModel, multiply: Callable[[Tensor, Tensor], Tensor], rows: int = 512, repeats: int = 40
) -> float:
    """Operations per second of a matrix product of the size that dominates: hidden states times an MLP weight."""
    weight = lm.oriented(Site(0, "mlp_out"))
    x = torch.randn(rows, weight.shape[1]).to(weight.dtype)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(x, weight)
        times.append(time.perf_counter() - start)
    return 2 * rows * weight.numel() / statistics.median(times)


def main() -> int:
    """Run both sides; the exit status is 1 if their outcomes differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--reference", type=int, help="requests that are done the official way; all by default")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--layer", type=int, default=13, help="where z lives; lower layers gain less")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    lm = load_model("smollm2-135m", dtype=args.dtype)
    for parameter in lm.model.parameters():
        parameter.requires_grad_(False)
    settings = GradientSearch(steps=args.steps, lr=args.lr)
    batch = encode_batch(lm, builtin_facts()[: args.requests], CONTEXTS)
    rate = gemm_rate(lm, torch.nn.functional.linear)
    our_rate = gemm_rate(lm, product) if has_fast_products() and lm.dtype == torch.float32 else rate

    GradientSearch(steps=2).search(lm, batch, args.layer)  # warm-up
    start = time.perf_counter()
    ours: Targets = settings.search(lm, batch, args.layer)
    our_time = time.perf_counter() - start
    reference(lm, batch, 0, args.layer, GradientSearch(steps=2))
    start = time.perf_counter()
    theirs = [reference(lm, batch, i, args.layer, settings) for i in range(len(batch))[: args.reference]]
    their_time = time.perf_counter() - start

    our_flops = counted(lambda: settings.search(lm, batch, args.layer))
    two, one = GradientSearch(steps=2), GradientSearch(steps=1)  # the last evaluation makes no step back
    their_flops = 0.0
    for i, (_, _, steps) in enumerate(theirs):
        last = counted(lambda i=i: reference(lm, batch, i, args.layer, one))
        their_flops += (counted(lambda i=i: reference(lm, batch, i, args.layer, two)) - last) * (steps - 1) + last
    n, m = len(batch), len(theirs)
    z = torch.stack([value for value, _, _ in theirs])
    z_error = float(((ours.values[:m] - z).norm(dim=1) / z.norm(dim=1)).median())
    loss_error = max(abs(float(a) - b) for a, (_, b, _) in zip(ours.loss[:m], theirs, strict=True))
    figures = {
        "ratio": their_time / m / (our_time / n),
        "seconds_per_request": our_time / n,
        "reference_seconds_per_request": their_time / m,
        "gflop_per_request": our_flops / n / 1e9,
        "reference_gflop_per_request": their_flops / m / 1e9,
        "gemm_gflops": our_rate / 1e9,
        "reference_gemm_gflops": rate / 1e9,
        "fraction_of_gemm": our_flops / our_time / our_rate,
        "reference_fraction_of_gemm": their_flops / their_time / rate,
        "evaluations": float(ours.steps.sum()),
        "reference_evaluations": float(sum(steps for _, _, steps in theirs)),
        "z_error_median": z_error,
        "loss_error_max": loss_error,
    }
    print(f"{n} requests, {len(CONTEXTS.templates)} contexts, {args.dtype}, {torch.get_num_threads()} threads")
    for name, value in figures.items():
        print(f"{name:32s} {value:10.4g}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    return int(loss_error > (0.001 if args.dtype == "float32" else 0.5))


if __name__ == "__main__":
    sys.exit(main())
