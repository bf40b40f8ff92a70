"""Time one layer's solve in sequential editing against the dense solve of the official code.

    python benchmarks/bench_solvers.py [--json FILE]

- ``alphaedit``: ``NullSpace(LeastSquares(ridge))`` against ``solve(P (K K^T + S) + ridge I, P K R^T)``.
- ``memit``: ``LeastSquares()`` with a covariance against ``R solve(lambda C + S + K K^T, K)^T``.

Everything is float64 and random. Both ways go through the same batches of a run, with about ``--history`` earlier
keys. A batch is the solve, the weight change as a matrix, and the keeping of history: official ``S += K K^T``; ours the
rows, and the growth of the factor, which each solve does for the batch before it. What is computed once per model is
there for both (eigenbasis; projector P). ``cold seconds`` is our first solve after a history of that size was loaded;
``dense cold seconds`` adds the sum of its outer products to a dense solve, which has to be formed from rows as well.
``GFLOP`` are operations by count: of both ways in a run and cold.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from paired import Figures, alternate, parser, report
from torch import Tensor

from cakeflow.solvers import Covariance, KeyHistory, LayerProblem, LeastSquares, NullSpace, Solver

TOLERANCE = 1e-9
THRESHOLD, RIDGE, LAMBDA = 0.02, 10.0, 15_000.0


@dataclass(frozen=True)
class Setting:
    """What both ways are given: C and P, keys and residuals of the timed batches, the keys of earlier ones, W."""

    covariance: Covariance
    projector: Tensor
    batches: list[tuple[Tensor, Tensor]]
    history: Tensor
    weight: Tensor


def setting(args: argparse.Namespace) -> Setting:
    """Random numbers, with the wanted share of the directions of C below the threshold."""
    gen = torch.Generator().manual_seed(args.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    null = round(args.null_share * args.d_in)
    values = torch.cat([torch.logspace(-5, -1.8, null), torch.logspace(-1.6, 1, args.d_in - null)]).double()
    vectors = torch.linalg.qr(normal(args.d_in, args.d_in))[0].contiguous()
    covariance = Covariance((vectors * values) @ vectors.T, LAMBDA, (values, vectors))
    projector = vectors[:, :null] @ vectors[:, :null].T
    batches = [(normal(args.n, args.d_in), normal(args.n, args.d_out)) for _ in range(args.repeats + 1)]
    earlier = max(args.history - (args.repeats // 2 + 1) * args.n, args.n)  # --history: seen by the middle batch
    return Setting(covariance, projector, batches, normal(earlier, args.d_in), normal(args.d_out, args.d_in))


def alphaedit(given: Setting, keys: Tensor, residual: Tensor, total: Tensor) -> Tensor:
    """The official AlphaEdit solve, keys as columns."""
    P, K, R = given.projector, keys.T, residual.T
    system = P @ (K @ K.T + total) + RIDGE * torch.eye(len(P), dtype=P.dtype)
    return torch.linalg.solve(system, P @ K @ R.T).T


def memit(given: Setting, keys: Tensor, residual: Tensor, total: Tensor) -> Tensor:
    """The official MEMIT solve with the keys of earlier batches counted in, keys as columns."""
    K, R = keys.T, residual.T
    return R @ torch.linalg.solve(LAMBDA * given.covariance.moment + total + K @ K.T, K).T


def relative(got: Tensor, want: Tensor) -> float:
    """Relative Frobenius error."""
    return float((got - want).norm() / want.norm())


def operations(args: argparse.Namespace, null: int) -> dict[str, dict[str, float]]:
    """Operations of one batch in GFLOP, by method: dense, ours in a run, ours after loading the history."""
    n, d, out, m = args.n, args.d_in, args.d_out, args.history
    matrix, outer = 2 * n * d * out, 2 * n * d * d
    factor = 2 * n * n * (2 * d + m) + 4 * n * m * d + n**3 / 3  # Gram, what the history takes away, triangular solves
    loading = 2 * m * m * d + m**3 / 3 + m * m * d  # Gram, its factor, the whitened rows
    small = 4 * d * min(null, d - null)
    counts = {
        "alphaedit": (
            2 * outer + 2 * d**3 + 2 * d**3 / 3 + 2 * d * d * out + outer + matrix,
            n * small + factor + matrix,
            m * small + loading,
        ),
        "memit": (2 * outer + 2 * d**3 / 3 + outer + matrix, 2 * outer + factor + matrix, 2 * m * d * d + loading),
    }
    return {
        name: {
            "GFLOP dense": dense / 1e9,
            "GFLOP ours": warm / 1e9,
            "GFLOP dense cold": (dense + 2 * m * d * d) / 1e9,
            "GFLOP ours cold": (warm + more) / 1e9,
        }
        for name, (dense, warm, more) in counts.items()
    }


def compare(given: Setting, solver: Solver, dense: Callable[..., Tensor], counts: dict[str, float]) -> Figures:
    """Both ways through the same batches."""

    def ours(keys: Tensor, residual: Tensor, history: KeyHistory) -> Tensor:
        problem = LayerProblem(keys, residual, given.weight, given.weight, given.covariance, history)
        change = solver.solve(problem).dense
        history.append(keys)
        return change

    def official(number: int) -> Tensor:
        change = dense(given, *given.batches[number], total)
        total.add_(given.batches[number][0].T @ given.batches[number][0])
        return change

    history, nothing = KeyHistory(), given.batches[0][1] * 0
    for keys in given.history.split(len(nothing)):  # the run so far
        ours(keys, nothing[: len(keys)], history)
    total = given.history.T @ given.history
    repeats = len(given.batches) - 1
    figures = alternate(lambda number: ours(*given.batches[number], history), official, relative, repeats, TOLERANCE)
    loaded = KeyHistory(given.history)
    start = time.perf_counter()
    ours(*given.batches[0], loaded)
    cold = time.perf_counter() - start
    start = time.perf_counter()
    given.history.T @ given.history
    summed = figures.reference + time.perf_counter() - start
    notes = {"cold seconds": cold, "ratio_cold": figures.reference / cold, "dense cold seconds": summed}
    return replace(figures, notes={**counts, **notes, "ratio_both_cold": summed / cold})


def main() -> int:
    """Time both forms; the exit status."""
    args_of = parser(__doc__, repeats=9)
    args_of.add_argument("--d-in", type=int, default=4096)
    args_of.add_argument("--d-out", type=int, default=1024)
    args_of.add_argument("--n", type=int, default=100, help="facts in a batch")
    args_of.add_argument("--history", type=int, default=2000, help="earlier keys, in the middle of the timed batches")
    args_of.add_argument("--null-share", type=float, default=0.7, help="share of the directions below the threshold")
    args_of.add_argument("--seed", type=int, default=0)
    args = args_of.parse_args()
    torch.set_num_threads(args.threads)
    given = setting(args)
    null = given.covariance.rank(THRESHOLD)
    print(f"d_in {args.d_in} ({null} null), d_out {args.d_out}, {args.n} keys, {args.history} in the history")
    forms: dict[str, tuple[Solver, Callable[..., Tensor]]] = {
        "alphaedit": (NullSpace(LeastSquares(ridge=RIDGE), THRESHOLD), alphaedit),
        "memit": (LeastSquares(), memit),
    }
    counts = operations(args, null)
    return report({name: compare(given, *form, counts[name]) for name, form in forms.items()}, args.json)


if __name__ == "__main__":
    sys.exit(main())
