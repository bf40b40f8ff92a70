"""What the side-by-side benchmarks share: both ways in turns in one process, medians, one table, one JSON file."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch

R = TypeVar("R")
T = TypeVar("T")


@dataclass(frozen=True)
class Figures:
    """One comparison: seconds of both ways (medians), their ratio, and how far the results differ.

    Attributes:
        ours: Seconds.
        reference: Seconds.
        ratio: Reference over ours.
        low: Smallest ratio of a pair.
        high: Largest ratio of a pair.
        error: Largest relative difference of the results.
        tolerance: Most that ``error`` may be.
        notes: Further figures by name.
    """

    ours: float
    reference: float
    ratio: float
    low: float
    high: float
    error: float
    tolerance: float
    notes: dict[str, float]


def alternate(
    ours: Callable[[int], T], reference: Callable[[int], T], error: Callable[[T, T], float], repeats: int, bar: float
) -> Figures:
    """Run both ways in turns, the first one changing from pair to pair; pair 0 warms up and only its results count.

    Args:
        ours: Takes the number of the pair.
        reference: The same work done the other way.
        error: Relative difference of two results.
        repeats: Pairs to time.
        bar: Most that the difference may be.
    """
    times: dict[Callable[[int], T], list[float]] = {ours: [], reference: []}
    worst = 0.0
    for number in range(repeats + 1):
        results = {}
        for way in (ours, reference) if number % 2 else (reference, ours):
            start = time.perf_counter()
            results[way] = way(number)
            times[way].append(time.perf_counter() - start)
        worst = max(worst, error(results[ours], results[reference]))
    mine, other = times[ours][1:], times[reference][1:]
    pairs = [b / a for a, b in zip(mine, other, strict=True)]
    middle = statistics.median(mine), statistics.median(other)
    return Figures(*middle, middle[1] / middle[0], min(pairs), max(pairs), worst, bar, {})


def compare(
    ways: dict[str, tuple[Callable[[list[R]], T], Callable[[list[R]], T], Callable[[T, T], float], float]],
    rows: list[R],
    args: argparse.Namespace,
) -> int:
    """Time every pair of ways over the same rows, the warm-up on the first row, and report; the exit status.

    Args:
        ways: Name -> ours, reference, difference of two results, most that it may be.
        rows: What both ways take.
        args: Arguments of ``parser``.
    """
    figures = {}
    for name, (ours, reference, error, bar) in ways.items():
        figures[name] = alternate(
            lambda number, way=ours: way(rows if number else rows[:1]),
            lambda number, way=reference: way(rows if number else rows[:1]),
            error,
            args.repeats,
            bar,
        )
    return report(figures, args.json)


def parser(doc: str | None, repeats: int) -> argparse.ArgumentParser:
    """The arguments that every comparison takes."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=int, default=repeats, help="pairs timed, after one that warms up")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of both ways")
    made.add_argument("--json", type=Path, help="write the figures here")
    return made


def report(figures: dict[str, Figures], path: Path | None) -> int:
    """Print the table and write the figures; the exit status is 1 where results differ by more than they may."""
    print(f"{'':26s}{'reference':>12s}{'ours':>12s}{'ratio':>8s}{'pairs':>14s}{'error':>10s}")
    for name, f in figures.items():
        spread = f"{f.low:.1f}-{f.high:.1f}"
        print(f"{name:26s}{f.reference:10.3f} s{f.ours:10.4f} s{f.ratio:8.1f}{spread:>14s}{f.error:10.1e}", end="")
        print("" if f.error <= f.tolerance else f"  ABOVE {f.tolerance:.0e}")
        for note, value in f.notes.items():
            print(f"    {note} {value:.4g}")
    if path:
        path.write_text(json.dumps({name: asdict(f) for name, f in figures.items()}, indent=1))
    return int(not all(f.error <= f.tolerance for f in figures.values()))
