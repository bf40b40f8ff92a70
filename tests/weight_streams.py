"""One weight that is edited batch by batch, for tests of what a stream of solves comes to."""

from dataclasses import dataclass

import torch

from cakeflow.solvers import Covariance, KeyHistory, LayerProblem

WIDTH, OUT = 8, 5


def numbers(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@dataclass
class Stream:
    """A weight that is edited batch by batch towards fixed values of fixed keys."""

    keys: torch.Tensor
    values: torch.Tensor
    original: torch.Tensor
    covariance: Covariance

    @classmethod
    def of(cls, count, seed):
        root = numbers(WIDTH, WIDTH, seed=seed + 3)
        root[:, : WIDTH // 2] *= 0.01  # half of the directions are nearly null
        covariance = Covariance(root.T @ root / WIDTH, weight=2.0)
        return cls(
            numbers(count, WIDTH, seed=seed),
            numbers(count, OUT, seed=seed + 1),
            numbers(OUT, WIDTH, seed=seed + 2),
            covariance,
        )

    def problem(self, rows, weight, history):
        keys = self.keys[rows]
        residual = self.values[rows] - keys @ weight.T
        return LayerProblem(keys, residual, weight, self.original, self.covariance, history)

    def run(self, solver, sizes):
        weight, history = self.original.clone(), KeyHistory()
        for rows in torch.arange(len(self.keys)).split(sizes):
            weight = weight + solver.solve(self.problem(rows, weight, history)).dense
            history.append(self.keys[rows], [str(row) for row in rows.tolist()], self.values[rows])
        return weight, history
