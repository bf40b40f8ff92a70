"""Time the work that is spread over ranks with one process and with several, each of one thread, on SmolLM2.

    python benchmarks/bench_ranks.py [--ranks 2] [--facts 8] [--traced 8] [--tile 2] [--steps 5] [--tokens 8192]
        [--json FILE]

The same tiles are searched, records scored, facts traced and second moments collected, eigenbases included, by one
process and by ranks that exchange results over gloo; nothing is edited. ``wall`` is seconds until every rank has all
results, exchanges included. ``cpu`` is processor seconds of the busiest rank, which other programs on the machine
hardly change. ``speedup`` is one process over several. Every process is a fork of one that has loaded the model.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cakeflow import Contexts, Evaluation, GradientSearch, ranks
from cakeflow.core import Statistics
from cakeflow.data import builtin_facts
from cakeflow.forward import encode_batch
from cakeflow.models import LanguageModel, Site, load_model
from cakeflow.tracing import CausalTrace, Fact, known_rows

CONTEXTS = Contexts((("{}",), ("Therefore, the answer is not that. {}", "I am a student in the field of. {}")))
LAYER = 13


def works(
    lm: LanguageModel, facts: int, traced: int, tile: int, steps: int, tokens: int
) -> dict[str, Callable[[], Any]]:
    """Name -> work that is done alike by any number of ranks."""
    requests = builtin_facts()[:facts]
    batch, search = encode_batch(lm, requests, CONTEXTS), GradientSearch(steps=steps)
    tiles = [range(start, min(start + tile, facts)) for start in range(0, facts, tile)]
    rows = known_rows(lm, [Fact.of(request) for request in builtin_facts()[: 4 * traced]], traced)[0]
    trace, layers = CausalTrace(draws=4, max_tokens=256), list(range(0, lm.depth, 3))
    statistics, sites = Statistics(tokens=tokens), [Site(layer, "mlp_out") for layer in range(LAYER - 3, LAYER + 1)]
    windows, folder = statistics.windows(lm, lm.key_width(sites[0])), Path(tempfile.mkdtemp())
    return {
        "target search": lambda: ranks.spread(tiles, lambda part: search.search(lm, batch.part(part), LAYER)),
        "evaluation": lambda: ranks.spread(tiles, lambda part: Evaluation().ask(lm, [requests[i] for i in part])),
        "tracing": lambda: trace.run(lm, rows, layers, Path(tempfile.mkdtemp())),
        "statistics": lambda: statistics.collect(lm, sites, folder / str(ranks.world_size()), windows=windows),
    }


def timed(count: int, jobs: dict[str, Callable[[], Any]]) -> dict[str, list[dict[str, float]]]:
    """Name of a work -> seconds of every rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / str(rank) for rank in range(count)]
        children = [_forked(rank, count, port, jobs, path) for rank, path in enumerate(paths)]
        statuses = [os.waitpid(child, 0)[1] for child in children]
        if any(statuses):
            raise SystemExit(f"a rank failed: {statuses}")
        ended = [json.loads(path.read_text()) for path in paths]
    return {name: [each[name] for each in ended] for name in jobs}


def _forked(rank: int, count: int, port: int, jobs: dict[str, Callable[[], Any]], path: Path) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        where = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=count)
        with ranks.together():
            path.write_text(json.dumps({name: _seconds(job) for name, job in jobs.items()}))
        status = 0
    finally:
        os._exit(status)


def _seconds(job: Callable[[], Any]) -> dict[str, float]:
    ranks.barrier()
    start, cpu = time.perf_counter(), time.process_time()
    job()
    return {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu}


def busiest(seconds: Sequence[dict[str, float]], name: str) -> float:
    """Seconds of the rank that took longest."""
    return max(each[name] for each in seconds)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("ranks", 2), ("facts", 8), ("traced", 8), ("tile", 2), ("steps", 5), ("tokens", 8192)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    jobs = works(load_model("smollm2-135m"), options.facts, options.traced, options.tile, options.steps, options.tokens)
    one, several = timed(1, jobs), timed(options.ranks, jobs)
    table = {
        name: {
            clock: {
                "one": busiest(one[name], clock),
                "several": busiest(several[name], clock),
                "speedup": busiest(one[name], clock) / busiest(several[name], clock),
            }
            for clock in ("wall", "cpu")
        }
        for name in jobs
    }
    print(json.dumps(table, indent=1))
    if options.json:
        options.json.write_text(json.dumps(vars(options) | {"json": None, "table": table}, indent=1))


if __name__ == "__main__":
    main()
