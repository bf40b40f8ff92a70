"""Input and output of solvers: pure numbers, no model and no tokenizer. Rows are facts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.errors import ShapeError
from cakeflow.solvers.covariance import Covariance
from cakeflow.solvers.history import KeyHistory


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """The task at one layer: find D such that ``W + D`` maps each key to its value plus its residual.

    Attributes:
        keys: n x d_in, one key per fact.
        residual: n x d_out, the change of the layer's output for that key.
        weight: d_out x d_in, the present weight.
        original_weight: d_out x d_in, the weight before any edit.
        covariance: Second moment of the keys to preserve, or None where a wrapper accounts for them.
        history: Keys of earlier edits, to preserve as well.
        prompt_keys: n x d_in, the keys of the bare prompts, where ``keys`` are means over contexts.
        loss: The model's loss at ``weight + change`` and its gradient, for solvers that descend it.
        tokens: What the projection reads at the m tokens that predict a token of a new target, m x d_in, and the
            gradients of the summed negative log-likelihood by what it writes there, m x d_out; for solvers that need
            no target values.
        earlier: The changes by earlier batches, oldest first; None where solvers are not to know them (no history).
        gap: n x d_out, what the facts miss at the value site, of which ``residual`` is this layer's part; None where
            facts are undone, which miss nothing.
        index: Position of the layer among the edited ones, from 0.
        decoys: Keys at this layer of m subjects that are not edited, by names to choose from (none for the built-in
            ones), their number for each fact, and a seed; for solvers that hide the edited ones among them.

    Raises:
        ShapeError: If the shapes do not fit together.
    """

    keys: Float[Tensor, "n d_in"]
    residual: Float[Tensor, "n d_out"]
    weight: Float[Tensor, "d_out d_in"]
    original_weight: Float[Tensor, "d_out d_in"]
    covariance: Covariance | None = None
    history: KeyHistory = field(default_factory=KeyHistory)
    prompt_keys: Float[Tensor, "n d_in"] | None = None
    loss: Callable[[Float[Tensor, "d_out d_in"]], tuple[float, Float[Tensor, "d_out d_in"]]] | None = None
    tokens: Callable[[], tuple[Float[Tensor, "m d_in"], Float[Tensor, "m d_out"]]] | None = None
    earlier: Sequence[Update] | None = ()
    gap: Float[Tensor, "n d_out"] | None = None
    index: int = 0
    decoys: Callable[[Sequence[str], int, int], Float[Tensor, "m d_in"]] | None = None

    def __post_init__(self) -> None:
        (n, d_in), (d_out, width) = self.keys.shape, self.weight.shape
        if self.residual.shape != (n, d_out) or width != d_in or self.original_weight.shape != self.weight.shape:
            raise ShapeError(
                "a layer problem needs keys n x d_in, residual n x d_out, weight and original_weight d_out x d_in; got "
                f"{tuple(self.keys.shape)}, {tuple(self.residual.shape)}, {tuple(self.weight.shape)}, "
                f"{tuple(self.original_weight.shape)}"
            )
        if self.covariance is not None and len(self.covariance) != d_in:
            raise ShapeError(f"covariance is {len(self.covariance)} wide, the keys are {d_in} wide")

    @property
    def values(self) -> Float[Tensor, "n d_out"]:
        """The output that each key is to get, ``W k`` and its residual; the weight is read some rows at a time."""
        parts = [self.keys @ rows.to(self.keys).T for rows in self.weight.split(512)]
        return torch.cat(parts, 1) + self.residual

    def in_null_space(self, threshold: float) -> LayerProblem:
        """Project all keys on the null space of the covariance and drop the covariance."""
        if self.covariance is None:
            raise ShapeError("a null space needs a covariance; give the problem one")
        return self.in_span(self.covariance.rank(threshold))

    def in_span(self, rank: int) -> LayerProblem:
        """Project all keys on the ``rank`` eigenvectors of smallest eigenvalue and drop the covariance."""
        if self.covariance is None:
            raise ShapeError("a span of eigenvectors needs a covariance; give the problem one")
        name, project = ("span", rank), partial(self.covariance.project_on, rank=rank)
        history, keys = self.history.derive(name, project, self.keys)
        return replace(self, keys=keys, covariance=None, history=history)


@dataclass(frozen=True, eq=False)
class Update:
    """A weight change ``D = left^T right``; a change of full rank leaves ``left`` out and keeps D in ``right``.

    Attributes:
        right: n x d_in (or D itself, d_out x d_in); a row belongs to a fact, to a token of one, or to a decoy.
        left: n x d_out, or None.
        deferred: Update that replaces this one once all layers of the batch are written, or None where it stays.
        is_plain: ``left`` is the problem's residual itself, so that D is linear in the residual; set by the solver.
        numbers: Measurements of the solver, by name; logged with those of the layer.
        gradients: n x d_out, of the loss by the outputs at the inputs ``right``, where later batches are solved with
            them; stored with the change.
        extra: Number of rows behind those of the facts, of decoys.
    """

    right: Float[Tensor, "n d_in"]
    left: Float[Tensor, "n d_out"] | None = None
    deferred: Update | None = None
    is_plain: bool = False
    numbers: dict[str, float] = field(default_factory=dict)
    gradients: Float[Tensor, "n d_out"] | None = None
    extra: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """d_out and d_in."""
        return self.right.shape[0] if self.left is None else self.left.shape[1], self.right.shape[1]

    @property
    def dense(self) -> Float[Tensor, "d_out d_in"]:
        """D."""
        return self.right if self.left is None else self.left.T @ self.right

    def rows(self, count: int = 512) -> Iterator[tuple[slice, Float[Tensor, "rows d_in"]]]:
        """Yield D some rows at a time: whole, it is the largest tensor of an edit."""
        for start in range(0, self.shape[0], count):
            some = slice(start, start + count)
            yield some, (self.right[some] if self.left is None else self.left[:, some].T @ self.right)

    def to(self, device: torch.device | str) -> Update:
        """Copy the update to a device."""
        left, deferred, gradients = self.left, self.deferred, self.gradients
        return replace(
            self,
            right=self.right.to(device),
            left=None if left is None else left.to(device),
            deferred=None if deferred is None else deferred.to(device),
            gradients=None if gradients is None else gradients.to(device),
        )

    def norm(self) -> float:
        """Return the Frobenius norm of D."""
        if self.left is None:
            return float(torch.linalg.vector_norm(self.right))
        squared = ((self.left @ self.left.T) * (self.right @ self.right.T)).sum()  # n x n, where D is d_out x d_in
        return float(squared.clamp_min(0).sqrt())
