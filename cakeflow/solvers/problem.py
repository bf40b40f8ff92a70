"""What a solver sees and what it returns: pure numbers, no model and no tokenizer. Rows are facts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    """The weight change wanted at one layer: ``W + D`` should map each key to its value plus its residual.

    Attributes:
        keys: n x d_in, one key per fact.
        residual: n x d_out, what the layer's output for that key should change by.
        weight: d_out x d_in, the weight now.
        origin: d_out x d_in, the weight before any edit.
        covariance: Second moment of the keys to preserve, or None where a wrapper has dealt with them.
        history: Keys of earlier edits, to preserve as well.
        bare: n x d_in, the keys of the bare prompts, where ``keys`` are means over contexts.
        loss: The model's loss at ``weight + change`` and its gradient, for solvers that descend it.

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

    def __post_init__(self) -> None:
        (n, d_in), (d_out, width) = self.keys.shape, self.weight.shape
        if self.residual.shape != (n, d_out) or width != d_in or self.original_weight.shape != self.weight.shape:
            raise ShapeError(
                "a layer problem needs keys n x d_in, residual n x d_out, weight and origin d_out x d_in; got "
                f"{tuple(self.keys.shape)}, {tuple(self.residual.shape)}, {tuple(self.weight.shape)}, "
                f"{tuple(self.original_weight.shape)}"
            )
        if self.covariance is not None and len(self.covariance) != d_in:
            raise ShapeError(f"covariance is {len(self.covariance)} wide, the keys are {d_in} wide")

    def in_null_space(self, threshold: float) -> LayerProblem:
        """The same problem with every key projected on the null space of the covariance, which is then dropped."""
        covariance = self.covariance
        if covariance is None:
            raise ShapeError("a null space needs a covariance; give the problem one")
        name, project = ("null space", threshold), partial(covariance.project, threshold=threshold)
        seen, keys = self.history.derive(name, project, self.keys)
        return replace(self, keys=keys, covariance=None, history=seen)


@dataclass(frozen=True, eq=False)
class Update:
    """A weight change ``D = left^T right``; a change of full rank leaves ``left`` out and keeps D in ``right``.

    Attributes:
        right: n x d_in (or D itself, d_out x d_in).
        left: n x d_out, or None.
        deferred: What takes its place once all layers of the batch are written, or None where it stays.
    """

    right: Float[Tensor, "n d_in"]
    left: Float[Tensor, "n d_out"] | None = None
    deferred: Update | None = None

    @property
    def dense(self) -> Float[Tensor, "d_out d_in"]:
        """D."""
        return self.right if self.left is None else self.left.T @ self.right

    def rows(self, count: int = 512) -> Iterator[tuple[slice, Float[Tensor, "rows d_in"]]]:
        """D, some rows at a time: whole, it is the largest thing that an edit could hold."""
        for start in range(0, self.right.shape[0] if self.left is None else self.left.shape[1], count):
            some = slice(start, start + count)
            yield some, (self.right[some] if self.left is None else self.left[:, some].T @ self.right)

    def to(self, device: torch.device | str) -> Update:
        """The same numbers on a device."""
        left, kept = self.left, self.deferred
        return Update(
            self.right.to(device), None if left is None else left.to(device), None if kept is None else kept.to(device)
        )

    def norm(self) -> float:
        """Frobenius norm of D."""
        if self.left is None:
            return float(torch.linalg.vector_norm(self.right))
        squared = ((self.left @ self.left.T) * (self.right @ self.right.T)).sum()  # D itself is far larger
        return float(squared.clamp_min(0).sqrt())
