"""A queue that weighs the preserved keys more the further a stream has carried a weight away from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow import LayerProblem, LeastSquares, Solver, Update
from cakeflow.errors import ConfigError, ShapeError
from cakeflow.solvers import KeyHistory

NOTHING = 1e-9
"""Change of a weight, in norms of it, below which a batch says nothing about how far batches lead."""


@dataclass(frozen=True)
class PreservationQueue(Solver):
    """``D - (W - W_0)``, D the inner change of W_0 for all facts so far, with C counted q times (LyapLock).

    The drift of a weight is ``d = tr((W - W_0) C (W - W_0)^T)``, the mean squared change of its outputs for the keys to
    preserve. q is 1 in the first batch, and ``max(1, q + d / (limit d_1) - 1)`` after one that ended at drift d; d_1 is
    that of the first one. With ``Z = q sqrt(limit d_1)`` and ``a = 1 / sqrt(limit d_1)`` this is the virtual queue of
    LyapLock's code (port in SasyaTitech/NAS; V 1, alpha 60, lambda 1000), whose solve is
    ``B A^-1`` with ``A = K K^T + S + a Z lambda C`` and ``B = R K^T + a Z lambda (W_0 - W) C + (V_p - W K_p) K_p^T``,
    keys as columns. V_p are the outputs that earlier keys had after their batch, not those that they were to get.

    Nothing is stored. Outputs and drifts follow from the keys of earlier batches and the outputs that they were to get,
    batch by batch, so that they are right after a resume, and facts that are out of force leave nothing behind.

    Attributes:
        inner: A solver that weighs C; its problem has the keys of all facts as new ones, and no history.
        limit: Drift that is free, in drifts of the first batch (alpha); None leaves the problem to ``inner``.
    """

    matrices = 10  # the change so far, its product with C, and what FromScratch takes
    inner: Solver = field(default_factory=LeastSquares)
    limit: float | None = 60.0

    def __post_init__(self) -> None:
        if self.limit is not None and not 0 < self.limit < math.inf:
            raise ConfigError(f"PreservationQueue: limit must be a number above 0, or null, got {self.limit}")

    def solve(self, problem: LayerProblem) -> Update:
        """Solve for all facts from the unedited weight, and take away what it was changed by already.

        Raises:
            ShapeError: If the problem has no covariance.
            ConfigError: If the weight was edited by batches whose keys, or their values, are not known.
        """
        if self.limit is None:
            return self.inner.solve(problem)
        if problem.covariance is None:
            raise ShapeError(
                "PreservationQueue needs the covariance of the keys to preserve; the problem has none: put it around "
                "solvers that transform keys"
            )
        name = ("preservation queue", repr(self), problem.covariance.weight)
        course = problem.history.cached(name, _Course)
        step = course.after([*_earlier(problem), (problem.keys, problem.values)], self, problem)
        assert step.change is not None
        moved = problem.weight.double() - problem.original_weight.double()
        return Update(step.change - moved, numbers={"queue": step.queue, "drift": step.drift})

    def solve_anew(self, problem: LayerProblem, earlier: Sequence[_Step], keys: Tensor, values: Tensor) -> _Step:
        """Solve one batch of the stream from the unedited weight.

        Args:
            problem: A problem of the weight.
            earlier: The batches before.
            keys: n x d_in, those of the batch.
            values: n x d_out, the outputs that they are to get.
        """
        assert problem.covariance is not None
        original, queue = problem.original_weight.double(), self._queue(earlier)
        known = torch.cat([*(step.keys for step in earlier), keys])
        residual = torch.cat([*(step.reached for step in earlier), values]) - known @ original.T
        whole = replace(
            problem, keys=known, residual=residual, weight=original, history=KeyHistory(), prompt_keys=None, gap=None,
            covariance=problem.covariance.weighted(queue),
        )  # fmt: skip
        change = self.inner.solve(whole).dense
        drift = float(((change @ problem.covariance.moment) * change).sum())
        counts = bool(change.norm() > NOTHING * original.norm())
        return _Step(keys, values, keys @ (original + change).T, queue, drift, counts, change)

    def _queue(self, earlier: Sequence[_Step]) -> float:
        """Return q after some batches."""
        first = next((step.drift for step in earlier if step.counts), 0.0)
        if not earlier or not first or self.limit is None:
            return 1.0
        return max(1.0, earlier[-1].queue + earlier[-1].drift / (self.limit * first) - 1)


@dataclass(eq=False)
class _Step:
    """One batch of a stream.

    Attributes:
        keys: n x d_in.
        values: n x d_out, the outputs that they were to get.
        reached: n x d_out, those that they had after the batch.
        queue: q, with which it was solved.
        drift: That of the weight after the batch.
        counts: Whether the weight was changed by more than rounding until then.
        change: d_out x d_in, how far the weight was from the unedited one; of the last batch only.
    """

    keys: Float[Tensor, "n d_in"]
    values: Float[Tensor, "n d_out"]
    reached: Float[Tensor, "n d_out"]
    queue: float
    drift: float
    counts: bool
    change: Float[Tensor, "d_out d_in"] | None

    def is_of(self, keys: Tensor, values: Tensor) -> bool:
        """Return True if it is the batch with these keys and values."""
        return torch.equal(self.keys, keys) and torch.equal(self.values, values)


class _Course:
    """The batches of a stream as far as they were solved; those that are no longer as they were are solved anew."""

    def __init__(self) -> None:
        self._steps: list[_Step] = []

    def after(
        self, batches: Sequence[tuple[Tensor, Tensor]], solver: PreservationQueue, problem: LayerProblem
    ) -> _Step:
        """Return the last one of some batches, each with its keys and values."""
        pairs = zip(self._steps, batches, strict=False)
        same = next((i for i, (step, batch) in enumerate(pairs) if not step.is_of(*batch)), len(self._steps))
        last = len(batches) - 1
        del self._steps[last if same > last and self._steps[last].change is None else same :]
        for keys, values in batches[len(self._steps) :]:
            if self._steps:
                self._steps[-1].change = None  # as large as the weight
            self._steps.append(solver.solve_anew(problem, self._steps, keys, values))
        return self._steps[last]


def _earlier(problem: LayerProblem) -> list[tuple[Tensor, Tensor]]:
    """Return the keys of each earlier batch and the outputs that they were to get, without facts that were taken back.

    Raises:
        ConfigError: If they are not known, though the weight was edited.
    """
    history = problem.history
    if history.keys is None or history.values is None:
        if not torch.equal(problem.original_weight.double(), problem.weight.double()):
            raise ConfigError(
                "PreservationQueue needs the keys of earlier edits with their values: set history: true, put it around "
                "solvers that transform keys, and start a new run where an older version edited"
            )
        return []
    in_force = torch.isfinite(history.values).all(1)
    pairs = [(history.keys[rows][in_force[rows]], history.values[rows][in_force[rows]]) for rows in history.batches]
    return [(keys, values) for keys, values in pairs if len(keys)]
