"""A null space that grows by the directions that the facts need most."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow import LayerProblem, LeastSquares, Solver, Update
from cakeflow.errors import ConfigError, NumericalError, ShapeError, require_positive
from cakeflow.solvers import Covariance


@dataclass(frozen=True)
class RankSearch(Solver):
    """``inner`` in the null space of C and further eigenvectors of it (AlphaEdit+, Liu et al. 2026, official code).

    Blocks of eigenvectors are added to the null space, by ascending eigenvalue, as long as the objective
    ``J = |D K^T - R|^2 + |D S^T|^2 + ridge |D|^2`` of the best D falls by more than a limit. J has no term for the
    preserved keys: the limit alone bounds what they pay. The price, ``tr(D C D^T)``, is the mean squared change of
    their outputs; it and the rank are among the update's numbers. Where J is 0, nothing is left to gain, and the
    search stops.

    Attributes:
        inner: Least squares with a ridge, whose objective J is; its problem has projected keys and no covariance.
        threshold: Eigenvalues of C below it count as null; None takes the covariance's own, which is the model's.
        gain: A block has to bring more than ``gain`` times the mean of all blocks. 0 takes whatever brings anything, 1
            only what brings more than the mean.
        theta: The rule of the official code in place of ``gain``: a block has to bring more than ``block * theta`` of
            the present J (``nullspace_searchthreshold``). A constant means something else at each width, since the
            same drop is shared by more blocks: on SmolLM2 the official ones accept all blocks.
        block: Number of eigenvectors in a block.
    """

    matrices = 8
    inner: Solver = field(default_factory=lambda: LeastSquares(ridge=10.0))
    threshold: float | None = None
    gain: float = 0.75
    theta: float | None = None
    block: int = 10

    def __post_init__(self) -> None:
        require_positive("RankSearch", self, "threshold", "block")
        if not self.gain >= 0:
            raise ConfigError(f"RankSearch.gain must be 0 or more, got {self.gain}")
        if self.theta is not None and math.isnan(self.theta):
            raise ConfigError("RankSearch.theta must be a number or null, got nan")
        _ridge(self.inner)

    def solve(self, problem: LayerProblem) -> Update:
        """Choose the rank, and solve the projected problem by ``inner``."""
        covariance = problem.covariance
        if covariance is None:
            raise ShapeError("RankSearch needs the covariance of the keys to preserve; the problem has none")
        threshold = covariance.threshold if self.threshold is None else self.threshold
        base = covariance.rank(threshold)
        objective = objectives(problem, _ridge(self.inner), base, self.block)
        if (rank := min(base + self.block * self.blocks(objective), len(covariance))) == 0:
            raise NumericalError(
                f"no eigenvalue of the keys' second moment is below threshold {threshold} (smallest "
                f"{float(covariance.eigen[0][0]):.1e}), and no block was accepted: nothing could change; raise the "
                "threshold"
            )
        update = self.inner.solve(problem.in_span(rank))
        return replace(update, numbers=update.numbers | {"rank": float(rank), "price": price(update, covariance)})

    def blocks(self, objective: Float[Tensor, " blocks+1"]) -> int:
        """Return the number of blocks that are accepted; the first refusal ends the search.

        Args:
            objective: J at the null space, and after each block.
        """
        drops = -objective.diff()
        limits = (
            self.gain * drops.sum() / max(1, len(drops))
            if self.theta is None
            else self.block * self.theta * objective[:-1]  # multiplied, not divided by: J may be 0
        )
        refused = (~(drops > limits)).nonzero()
        return int(refused[0]) if len(refused) else len(drops)


def _ridge(inner: Solver) -> float:
    if not isinstance(inner, LeastSquares) or not inner.ridge > 0:
        raise ConfigError(
            f"RankSearch.inner must be LeastSquares with ridge above 0, whose objective it lowers; got {inner!r}"
        )
    return inner.ridge


def objectives(problem: LayerProblem, ridge: float, rank: int, block: int) -> Float[Tensor, " blocks+1"]:
    """Return the least J in the span of the first ``rank`` eigenvectors of C, and after each further block of them.

    With all keys as rows X in the eigenbasis, those of the history behind the new ones, and the residuals R, 0 behind
    them, ``J = ridge tr(R^T (X_r X_r^T + ridge I)^-1 R)``. In coordinates that make that matrix the identity at the
    first rank, r further columns B take ``ridge tr(R^T B (I + B^T B)^-1 B^T R)`` off; and since the first columns of
    a Cholesky factor are the factor of the first columns, one factor of ``I + B^T B`` for all columns has every rank.

    Args:
        problem: Keys, residuals and history, with a covariance.
        ridge: Multiple of the identity; above 0.
        rank: Rank to begin with.
        block: Number of eigenvectors in a block; the last one may be smaller.

    Raises:
        NumericalError: If the keys' Gram matrix is not positive definite in floating point.
    """
    assert problem.covariance is not None
    vectors = problem.covariance.eigen[1]
    history, rows = problem.history.derive("eigenbasis", lambda keys: keys @ vectors, problem.keys)
    if history.keys is not None:
        rows = torch.cat([rows, history.keys])
    null, rest, residual = rows[:, :rank], rows[:, rank:], problem.residual
    residual = torch.nn.functional.pad(residual, (0, 0, 0, len(rows) - len(residual)))
    lower = _factor(null @ null.T, ridge)
    residual, rest = (torch.linalg.solve_triangular(lower, each, upper=False) for each in (residual, rest))
    columns = torch.linalg.solve_triangular(_factor(rest.T @ rest, 1.0), rest.T @ residual, upper=False)
    drops = columns.square().sum(1)
    by_block = torch.nn.functional.pad(drops, (0, -len(drops) % block)).view(-1, block).sum(1)
    sums = torch.cat([drops.new_zeros(1), by_block.cumsum(0)])
    result: Tensor = ridge * (residual.square().sum() - sums)
    return result


def _factor(gram: Float[Tensor, "d d"], ridge: float) -> Float[Tensor, "d d"]:
    gram.diagonal().add_(ridge)
    lower: Tensor
    lower, info = torch.linalg.cholesky_ex(gram)
    if int(info) or not bool(lower.isfinite().all()):
        raise NumericalError("RankSearch: the Gram matrix of the keys is not positive definite; set ridge higher")
    return lower


def price(update: Update, covariance: Covariance) -> float:
    """Return ``tr(D C D^T)``, the mean squared change of the output for the keys to preserve."""
    values, vectors = covariance.eigen  # used already, where C itself might have to be moved first
    coordinates = update.right @ vectors
    gram = (coordinates * values) @ coordinates.T
    return float(gram.trace() if update.left is None else (gram * (update.left @ update.left.T)).sum())
