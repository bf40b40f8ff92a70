"""Seconds and memory per fact as a batch grows, and per solve as the history grows.

    python benchmarks/bench_growth.py [--facts 1 10 100 1000] [--history 0 1000 10000] [--steps 2] [--json FILE]

Each batch of SmolLM2-135M is edited by ``--method`` in a process of its own, with ``--steps`` steps a target value and
no evaluation: seconds and peak GiB beyond the model by phase, and seconds for the hashes of a batch, of the edited
weights before and after it. Each history is of random keys as wide as SmolLM2's; its row has the seconds of a batch of
100 keys, first when nothing is cached (cold) and then in a run (warm), and the bytes that the history holds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_memory import facts
from bench_targets import CONTEXTS

from cakeflow import Editor
from cakeflow.forward import GIB
from cakeflow.solvers import Covariance, KeyHistory, LayerProblem, LeastSquares, NullSpace

D_IN, D_OUT, BATCH = 1536, 576, 100
PHASES = ("targets", "keys", "allocate", "solve", "ask")


def edit(method: str, count: int, steps: int) -> dict[str, float]:
    """Edit some facts in this process; seconds and GiB by phase."""
    trainer = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    editor = Editor.from_pretrained("smollm2-135m", method, contexts=CONTEXTS, rounds=0, chat=False, trainer=trainer)
    editor.module.targets = replace(editor.module.targets, steps=steps)
    editor.fit(facts(count), evaluate=False)
    timings, peaks = editor.module.timings, editor.module.peaks
    seconds = {f"{phase}, s": timings[phase] for phase in PHASES}
    gib = {f"{phase}, GiB": peaks[phase] / GIB for phase in PHASES}
    start, journal = time.perf_counter(), editor.journal
    journal.memory.check()
    for place in journal[-1].places:
        journal.hash(place)
    seconds["hashes, s"] = time.perf_counter() - start
    return {**seconds, **gib, "s per fact": sum(seconds.values()) / count, "peak, GiB": max(gib.values())}


def elsewhere(method: str, count: int, steps: int) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--one", str(count), "--method", method, "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def solve(earlier: int) -> dict[str, float]:
    """Solve two batches behind a history; seconds, and the MiB of the history's keys."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    values = torch.logspace(-5, 1, D_IN, dtype=torch.float64)
    vectors = torch.linalg.qr(normal(D_IN, D_IN))[0].contiguous()
    covariance = Covariance((vectors * values) @ vectors.T, 15_000.0, (values, vectors))
    solver, weight, history = NullSpace(LeastSquares(ridge=1.0), 0.02), normal(D_OUT, D_IN), KeyHistory()
    if earlier:
        history = KeyHistory(normal(earlier, D_IN))
    times = []
    for _ in range(3):
        keys = normal(BATCH, D_IN)
        start = time.perf_counter()
        solver.solve(LayerProblem(keys, normal(BATCH, D_OUT), weight, weight, covariance, history))
        times.append(time.perf_counter() - start)
        history.append(keys)
    return {"cold, s": times[0], "warm, s": times[2], "keys, MiB": 8 * (earlier + 3 * BATCH) * D_IN / 2**20}


def row(name: str, figures: dict[str, float]) -> str:
    """A line of a table."""
    return f"{name:>8s}" + "".join(f"{value:14.4g}" for value in figures.values())


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--facts", type=int, nargs="*", default=[1, 10, 100, 1000])
    options.add_argument("--history", type=int, nargs="*", default=[0, 1000, 10_000])
    options.add_argument("--method", default="alphaedit")
    options.add_argument("--steps", type=int, default=2)
    options.add_argument("--json", type=Path)
    options.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.one:
        print(json.dumps(edit(args.method, args.one, args.steps)))
        return
    rows: dict[str, Any] = {}
    for title, counts, measure in (
        ("facts", args.facts, lambda count: elsewhere(args.method, count, args.steps)),
        ("history", args.history, solve),
    ):
        for number, count in enumerate(counts):
            rows[f"{title}, {count}"] = figures = measure(count)
            if number == 0:
                print(f"{title:>8s}" + "".join(f"{name:>14s}" for name in figures))
            print(row(str(count), figures), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
