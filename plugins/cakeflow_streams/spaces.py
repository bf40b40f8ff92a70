"""Spaces that a stream of edits uses up, or that are taken anew as its keys gather."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow import LayerProblem, LeastSquares, Solver, Update
from cakeflow.errors import ConfigError, NumericalError, ShapeError, require_positive
from cakeflow.solvers import Covariance, KeyHistory

ROOM = 1e-9
"""Part of a key, in norms, below which nothing is left of it but rounding."""


@dataclass(frozen=True)
class UnusedSpace(Solver):
    """``inner`` on the part of the keys that earlier keys do not span, with no history (EvoEdit).

    After each batch ``P <- P - Q Q^T``, Q the left singular vectors of P K (keys as columns) whose singular values
    exceed rounding, ``max(n, d_in) eps`` times the largest one of K. In ``NullSpace`` and over ``LeastSquares(ridge)``
    this is ``D = R (K^T P K + ridge I)^-1 K^T P`` as in the code of EvoEdit (Euphoria040201/RLSEdit): an n x n system,
    and room for as many facts as P has dimensions. That code measures rounding by P K instead, and skips batches that
    would change next to nothing.

    Attributes:
        inner: The solver; its problem has projected keys and no history.
    """

    inner: Solver = field(default_factory=lambda: LeastSquares(ridge=1.0))

    def solve(self, problem: LayerProblem) -> Update:
        """Solve by ``inner`` for what is left of the keys.

        Raises:
            NumericalError: If nothing is left of them.
        """
        keys = problem.history.grown("span", _Span).outside(problem.keys)
        if len(problem.history) and bool((keys.norm(dim=1) <= ROOM * problem.keys.norm(dim=1)).all()):
            raise NumericalError(
                f"the {len(problem.history)} earlier keys span all keys of this batch, so that nothing could change; "
                "raise statistics.null_threshold, edit another layer, or preserve the history by LeastSquares"
            )
        return self.inner.solve(replace(problem, keys=keys, history=KeyHistory()))


class _Span:
    """An orthonormal basis of what a growing set of keys spans, in blocks of rows, one for each batch."""

    def __init__(self) -> None:
        self._count = 0
        self._blocks: list[Float[Tensor, "r d_in"]] = []

    def __len__(self) -> int:
        return self._count

    def outside(self, keys: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """Return keys without their components in the span; twice, which makes them orthogonal to the last bit."""
        for block in [*self._blocks, *self._blocks]:
            keys = torch.addmm(keys, keys @ block.T, block, alpha=-1)
        return keys

    def grow(self, keys: Float[Tensor, "n d_in"]) -> None:
        """Take in the keys of a batch."""
        rest = self.outside(keys)
        _, values, directions = torch.linalg.svd(rest, full_matrices=False)
        limit = max(keys.shape) * torch.finfo(keys.dtype).eps * torch.linalg.matrix_norm(keys, 2)
        fresh = self.outside(directions[values > limit])  # dividing by small values brought rounding back
        self._count += len(keys)
        self._blocks.append(torch.linalg.qr(fresh.T).Q.T)


@dataclass(frozen=True)
class RenewedNullSpace(Solver):
    """``inner`` in a null space that is taken anew as earlier keys gather, with C as a cost inside it (BetaEdit).

    ``A = P (K K^T + S + lambda C) + ridge I`` with ``LeastSquares(ridge)`` inside, keys as columns, S the sum over t
    earlier keys. P is the null space of C, and after ``every`` edits that of ``(S / t + lambda C) / (1 + lambda)``, and
    so on. What leaks through eigenvalues below the threshold has a price then, which is none in ``NullSpace``. Follows
    lbq8942/BetaEdit: lambda 3000, ridge 10, threshold 0.02. That code also ends the run where an update's norm is above
    ``20 sqrt(n)``; here ``max_relative_update`` undoes a batch that ran away.

    Attributes:
        inner: The solver; its problem has projected keys, and C projected on both sides.
        every: Least number of edits between renewals; None keeps the null space of C.
        threshold: Eigenvalues below it count as null; None takes the covariance's own, which is the model's.
        cost: lambda, 0 or more; None takes the covariance's own (``statistics.cov_weight``).
    """

    matrices = 20  # eigenvectors, moments and the projected C, each d_in x d_in: four times the weight of most MLPs
    inner: Solver = field(default_factory=lambda: LeastSquares(ridge=10.0))
    every: int | None = 1000
    threshold: float | None = None
    cost: float | None = None

    def __post_init__(self) -> None:
        require_positive("RenewedNullSpace", self, "every", "threshold")
        if self.cost is not None and not self.cost >= 0:
            raise ConfigError(f"RenewedNullSpace: cost must be 0 or more, got {self.cost}")

    def solve(self, problem: LayerProblem) -> Update:
        """Solve the projected problem by ``inner``.

        Raises:
            ShapeError: If the problem has no covariance.
            NumericalError: If there is no null space.
        """
        covariance, history = problem.covariance, problem.history
        if covariance is None:
            raise ShapeError("RenewedNullSpace needs the covariance of the keys to preserve; the problem has none")
        threshold = covariance.threshold if self.threshold is None else self.threshold
        count, weight = self._count(history), covariance.weight if self.cost is None else self.cost
        name = ("renewed null space", self.every, threshold, weight)
        make = partial(_mixed, covariance, weight, history, count, threshold)
        space, cost = history.cached(name, _Latest).use(count, make)
        if space.rank(threshold) == 0:
            raise NumericalError(
                f"no direction of the keys is below threshold {threshold} after {count} edits (least second moment "
                f"{float(space.eigen[0][0]):.1e}): nothing could change; raise the threshold"
            )
        earlier, keys = history.derive((*name, count), partial(space.project, threshold=threshold), problem.keys)
        return self.inner.solve(replace(problem, keys=keys, history=earlier, covariance=cost))

    def _count(self, history: KeyHistory) -> int:
        """Return the number of keys at the last renewal: whenever a batch ends that makes ``every`` since the last."""
        count = 0
        for rows in history.batches if self.every else ():
            count = rows.stop if rows.stop - count >= (self.every or 0) else count
        return count


Spaces = tuple[Covariance, Covariance]
"""A moment whose null space is edited in, and the cost there."""


class _Latest:
    """The spaces of the last renewal only: each is several times as large as the weight."""

    def __init__(self) -> None:
        self._count = -1
        self._spaces: Spaces | None = None

    def use(self, count: int, make: Callable[[], Spaces]) -> Spaces:
        """Return the spaces after a number of keys, made anew if the last ones are others."""
        if self._spaces is None or self._count != count:
            self._count, self._spaces = count, make()
        return self._spaces


def _mixed(covariance: Covariance, weight: float, history: KeyHistory, count: int, threshold: float) -> Spaces:
    """Return the moment of preserved and earlier keys, and C projected on the null space of it."""
    if count == 0 or history.keys is None:
        own = Covariance(covariance.moment, weight, covariance.eigen, threshold)
        return own, own  # no part of C leads out of its own null space, so it need not be projected
    rows = history.keys[:count]
    space = Covariance((rows.T @ rows / count + weight * covariance.moment) / (1 + weight), weight, threshold=threshold)
    half = space.project(covariance.moment, threshold)
    return space, Covariance(space.project(half.T, threshold), weight, threshold=threshold)
