"""Edits from one gradient: no search of target values, no second moment, no keys to preserve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow import LayerProblem, Solver, Update
from cakeflow.errors import ConfigError, NumericalError, require_positive


@dataclass(frozen=True)
class NormalizedGradient(Solver):
    """``D^T = (K^T K + ridge I)^-1 K^T V`` with ``V = -lr |k'|^2 g'``, row by row (UltraEdit, arXiv 2505.14679).

    Rows are tokens: k is what the projection reads where a token of a new target is predicted, g the gradient of the
    loss by what it writes there. k' and g' are k and g less their mean, over their standard deviation, coordinate by
    coordinate, over all tokens of this stream so far, those of the batch included. Keys and gradients of earlier
    batches stand in their changes (``Update.gradients``), so that a batch that is taken back no longer counts.

    Departures from the code (XiaojieGu/UltraEdit): each weight has a mean and a deviation of its own, where the code
    pools weights of one shape; a layer's gradient is taken after the layers below were changed; variances are exact,
    where the code takes each batch's sum of squares n / (n - 1) times; the loss is a sum over tokens, so that no row
    depends on the size of its batch.

    Attributes:
        lr: 1e-6 for Llama and Mistral, 2e-6 for GPT-J and Qwen; a squared k' is about as large as d_in.
        ridge: alpha: 10 in the code's script, 1 in its configs.
    """

    matrices = 4
    lr: float = 1e-6
    ridge: float = 10.0

    @property
    def needs_targets(self) -> bool:
        """False: gradients take the place of target values."""
        return False

    def __post_init__(self) -> None:
        require_positive("NormalizedGradient", self, "lr", "ridge")

    def solve(self, problem: LayerProblem) -> Update:
        """Solve for the tokens of a batch, in the form with as many rows as tokens.

        Raises:
            ConfigError: If facts are to be taken back alone, or the problem has no gradients, nor earlier batches have.
            NumericalError: If there were fewer than two tokens so far, which have no deviation.
        """
        if problem.tokens is None:
            raise ConfigError("NormalizedGradient needs the gradients at the targets' tokens; the problem has none")
        if problem.gap is None:
            raise ConfigError("NormalizedGradient takes back whole batches only: rollback(batch=NUMBER)")
        keys, gradients = problem.tokens()
        rows, widths = torch.cat([keys, gradients], 1), [keys.shape[1], gradients.shape[1]]
        seen = (
            problem.history.cached("moments of tokens", _Seen).after(problem.earlier or (), rows.device).with_rows(rows)
        )
        if seen.count < 2:
            raise NumericalError(
                "NormalizedGradient: one token so far, and no deviation of one; edit two facts at once to begin with"
            )
        normal_keys, normal_gradients = seen.normalize(rows).split(widths, 1)
        values = -self.lr * normal_keys.square().sum(1, keepdim=True) * normal_gradients
        system = keys @ keys.T
        system.diagonal().add_(self.ridge)
        left = torch.cholesky_solve(values, torch.linalg.cholesky(system))
        return Update(keys, left, numbers={"tokens": float(len(keys)), "seen": seen.count}, gradients=gradients)


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and sum of squared deviations of rows.

    Attributes:
        count: Number of rows.
        mean: d.
        squares: d.
    """

    count: float
    mean: Float[Tensor, " d"] | float
    squares: Float[Tensor, " d"] | float

    def with_rows(self, rows: Float[Tensor, "m d"]) -> Moments:
        """Return the moments of these rows as well (Chan et al. 1979).

        Args:
            rows: At least one.

        Example:
            >>> import torch
            >>> both = Moments(0.0, 0.0, 0.0).with_rows(torch.tensor([[1.0]])).with_rows(torch.tensor([[3.0], [5.0]]))
            >>> both.count, both.mean.tolist(), both.squares.tolist()
            (3.0, [3.0], [8.0])
        """
        count, mean = self.count + len(rows), rows.mean(0)
        apart = mean - self.mean
        squares = (rows - mean).square().sum(0) + apart.square() * self.count * len(rows) / count
        return Moments(count, self.mean + apart * len(rows) / count, self.squares + squares)

    def normalize(self, rows: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        """Return rows less the mean, over the standard deviation."""
        deviation = torch.as_tensor(self.squares / (self.count - 1)).sqrt()
        result: Tensor = (rows - self.mean) / (deviation + torch.finfo(rows.dtype).eps)
        return result


NONE = Moments(0.0, 0.0, 0.0)
"""The moments of no rows."""


class _Seen:
    """Moments of the tokens of a growing number of batches; those that are no longer there are taken anew."""

    def __init__(self) -> None:
        self._updates: list[Update] = []
        self._moments = NONE

    def after(self, updates: Sequence[Update], device: torch.device) -> Moments:
        """Return the moments of keys and gradients after some changes.

        Raises:
            ConfigError: If one was made by another solver.
        """
        count = len(self._updates)
        if len(updates) < count or any(a is not b for a, b in zip(self._updates, updates[:count], strict=True)):
            self._updates, self._moments = [], NONE
        for update in updates[len(self._updates) :]:
            if update.gradients is None or update.left is None:
                raise ConfigError(
                    "NormalizedGradient: an earlier batch was edited by another solver, so that there are no gradients "
                    "of it; begin from the unedited model"
                )
            self._moments = self._moments.with_rows(torch.cat([update.right, update.gradients], 1).to(device))
            self._updates.append(update)
        return self._moments
