"""Rates of float32 matrix products in the shapes of an edit: as torch makes them, and by oneDNN's kernel.

    python benchmarks/bench_products.py [--threads N] [--json FILE]

Prints GFLOP per second of outputs (x W^T) and gradients (g W), torch's and the kernel's, for SmolLM2's projections and
its head, and whether cakeflow takes the kernel on this processor. The exit status is 1 if results differ by more than
1e-5 of their norm.
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

from cakeflow.models import has_fast_products, product

SHAPES = ((1536, 576), (576, 1536), (576, 576), (49152, 576))
ROWS = (8, 24, 64, 224, 690)
TOLERANCE = 1e-5


def seconds(run: Callable[[], Tensor], repeats: int = 20) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


@torch.no_grad()
def main() -> int:
    """Time, compare, print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--json", type=Path)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    generator, rows, worst = torch.Generator().manual_seed(0), [], 0.0
    print(f"{args.threads} threads; cakeflow takes the kernel here: {has_fast_products()}")
    print(f"{'rows':>5s} {'d_out':>6s} {'d_in':>5s} {'x W^T':>8s} {'kernel':>8s} {'g W':>8s} {'kernel':>8s}")
    for count in ROWS:
        for d_out, d_in in SHAPES:
            w = torch.randn(d_out, d_in, generator=generator)
            x, g = (torch.randn(count, width, generator=generator) for width in (d_in, d_out))
            ways: list[Callable[[], Tensor]] = [
                lambda x=x, w=w: torch.nn.functional.linear(x, w), lambda x=x, w=w: product(x, w),
                lambda g=g, w=w: g @ w, lambda g=g, w=w: product(g, w.T),
            ]  # fmt: skip
            for theirs, ours in (ways[:2], ways[2:]):
                worst = max(worst, float((ours() - theirs()).norm() / theirs().norm()))
            rates = [2e-9 * count * d_out * d_in / seconds(way) for way in ways]
            rows.append([count, d_out, d_in, *rates])
            print(f"{count:5d} {d_out:6d} {d_in:5d} " + " ".join(f"{rate:8.0f}" for rate in rates), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"threads": args.threads, "rows": rows, "error": worst}, indent=1))
    return int(not worst <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
