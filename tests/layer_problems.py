"""Random problems of one layer with an earlier batch, and the dense forms of what is solved."""

from dataclasses import dataclass, replace

import torch

from cakeflow import LayerProblem
from cakeflow.solvers import Covariance, KeyHistory

THRESHOLD = 1.0
"""Above the eigenvalues of the null space, below the others."""


@dataclass
class LayerCase:
    """Keys K, residuals R, earlier keys S, and a second moment C whose eigenvalues are apart; rows are facts."""

    n: int = 3
    m: int = 4
    d_in: int = 9
    null: int = 3
    seed: int = 0
    index: int = 0

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        self.K, self.S, self.R, basis = (
            torch.randn(*shape, dtype=torch.float64, generator=generator)
            for shape in ((self.n, self.d_in), (self.m, self.d_in), (self.n, 4), (self.d_in, self.d_in))
        )
        self.U = torch.linalg.qr(basis).Q
        small, large = torch.arange(self.null) * 1e-3 + 1e-3, torch.arange(self.d_in - self.null) + 2.0
        self.C = (self.U * torch.cat([small, large]).double()) @ self.U.T

    @property
    def problem(self):
        weight = torch.zeros(4, self.d_in, dtype=torch.float64)
        history = KeyHistory(self.S if self.m else None)
        covariance = Covariance(self.C, threshold=THRESHOLD)
        gap = 2 * self.R
        return LayerProblem(self.K, self.R, weight, weight, covariance, history, gap=gap, index=self.index)

    def projector(self, rank):
        return self.U[:, :rank] @ self.U[:, :rank].T

    def dense(self, rank, ridge, weights):
        """D of the papers: ``solve(P (K^T K + S^T diag(w) S) + ridge I, P K^T R)``, transposed."""
        P, gram = self.projector(rank), self.K.T @ self.K + self.S.T @ (weights[:, None] * self.S)
        return torch.linalg.solve(P @ gram + ridge * torch.eye(self.d_in).double(), P @ self.K.T @ self.R).T

    def objective(self, D, ridge, weights):
        """``|D K^T - R^T|^2 + sum_j w_j |D s_j|^2 + ridge |D|^2``."""
        old = (weights * (self.S @ D.T).square().sum(1)).sum()
        return float((self.K @ D.T - self.R).square().sum() + old + ridge * D.square().sum())

    def without_history(self):
        return replace(self.problem, history=KeyHistory())


def close(got, want, tolerance=1e-9):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * (float(want.abs().max()) + 1e-9))
