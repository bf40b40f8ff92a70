"""Keys of earlier edits, with what solvers derive from them grown row by row rather than computed again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.errors import NumericalError

Map = Callable[[Float[Tensor, "n d_in"]], Float[Tensor, "n d_in"]]
"""A linear map of keys, row by row."""


T = TypeVar("T")


class _Rows:
    """A matrix that rows are added to; its memory doubles when full, so that adding copies the new rows only.

    Remembers which rows came together: what is derived from them group by group has the same bits whenever it is done.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._size = 0
        self._ends: list[int] = []

    def __len__(self) -> int:
        return self._size

    def append(self, rows: Tensor) -> None:
        end = self._size + len(rows)
        if self._memory is None or end > len(self._memory):
            memory = rows.new_empty(max(end, 2 * self._size), rows.shape[1])
            if self._memory is not None:
                memory[: self._size] = self.rows
            self._memory = memory
        self._memory[self._size : end] = rows
        self._size = end
        self._ends.append(end)

    def since(self, start: int) -> Iterator[Tensor]:
        """The rows from ``start`` on, as they came."""
        for end in self._ends:
            if end > start:
                yield self.rows[start:end]
                start = end

    @property
    def rows(self) -> Tensor:
        assert self._memory is not None
        return self._memory[: self._size]


class _Last(Generic[T]):
    """A function's last result, given again for equal keys: those of a batch come back when they join the history."""

    def __init__(self, function: Callable[[Tensor], T]) -> None:
        self._function = function
        self._known: tuple[Tensor, T] | None = None

    def __call__(self, keys: Tensor) -> T:
        if self._known is None or not torch.equal(self._known[0], keys):
            self._known = keys.clone(), self._function(keys)
        return self._known[1]

    def forget(self) -> None:
        self._known = None


class GramFactor:
    """The inverse of ``I + K M K^T`` for a growing set of keys K and a fixed symmetric map M, as a whitened matrix.

    With ``L L^T = I + K M K^T`` (Cholesky) the rows of ``Y = L^-1 K M`` are all that is kept: what older keys take away
    from new ones is ``K_new Y^T Y``. New rows of Y are a by-product of the solve in which their keys were new. Where
    the factorisation fails no jitter is added: it would be a ridge that nobody asked for, so an error ends the batch.

    Args:
        transform: M, applied to keys as rows.
    """

    def __init__(self, transform: Map) -> None:
        self._transform = transform
        self._whitened = _Rows()
        self._border = _Last(self._new_rows)

    def __len__(self) -> int:
        return len(self._whitened)

    def _new_rows(self, keys: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n d_in"]]:
        """What new keys would add: the diagonal block of L and the rows of Y (Schur complement)."""
        mapped = self._transform(keys)
        schur = torch.eye(len(keys), dtype=keys.dtype, device=keys.device) + keys @ mapped.T
        if len(self):
            side = keys @ self._whitened.rows.T
            schur -= side @ side.T
            mapped = torch.addmm(mapped, side, self._whitened.rows, alpha=-1)
        corner, info = torch.linalg.cholesky_ex((schur + schur.T) / 2)
        if int(info) or not bool(torch.isfinite(corner).all()):
            raise NumericalError("the Gram matrix of the keys is not positive definite; set ridge higher")
        whitened = torch.linalg.solve_triangular(corner.T, mapped.T, upper=True, left=False)  # spares a transposed copy
        return corner, whitened.T

    def grow(self, keys: Float[Tensor, "n d_in"]) -> None:
        """Take in more keys.

        Raises:
            NumericalError: If the grown matrix is not positive definite.
        """
        self._whitened.append(self._border(keys)[1])
        self._border.forget()

    def last_rows(self, keys: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """Rows of ``(I + K M K^T)^-1 K M`` that belong to new keys, the old ones counted in.

        Raises:
            NumericalError: If the grown matrix is not positive definite.
        """
        corner, whitened = self._border(keys)
        rows: Tensor = torch.linalg.solve_triangular(corner, whitened.T, upper=False, left=False)
        return rows.T


class KeyHistory:
    """The keys that earlier edits used at one layer, kept as rows (m x d_in), not as their d_in x d_in sum.

    Rows are what resuming, taking back and exporting need, and they let a solve cost m instead of d_in. Derived
    quantities are remembered by name and extended when rows are added.

    Args:
        keys: The first rows, if any.
    """

    def __init__(self, keys: Float[Tensor, "m d_in"] | None = None) -> None:
        self._rows = _Rows()
        self._derived: dict[Hashable, tuple[KeyHistory, _Last[Tensor]]] = {}
        self._factors: dict[Hashable, GramFactor] = {}
        self._outer: tuple[int, Tensor | float] = 0, 0.0
        if keys is not None:
            self.append(keys)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def keys(self) -> Float[Tensor, "m d_in"] | None:
        """All rows, or None where there are none."""
        return self._rows.rows if len(self) else None

    def append(self, keys: Float[Tensor, "n d_in"]) -> None:
        """Add the keys of a batch that was committed."""
        self._rows.append(keys)

    def derive(
        self, name: Hashable, transform: Map, keys: Float[Tensor, "n d_in"]
    ) -> tuple[KeyHistory, Float[Tensor, "n d_in"]]:
        """The history of transformed keys, and ``keys`` transformed; only what is new since the last call is computed.

        Args:
            name: What the result is remembered by; one name stands for one map.
            transform: The map.
            keys: Keys of the batch in hand, no part of the history yet.
        """
        child, last = self._derived.setdefault(name, (KeyHistory(), _Last(transform)))
        for fresh in self._rows.since(len(child)):
            child.append(last(fresh))
        return child, last(keys)

    def factor(self, name: Hashable, transform: Map) -> GramFactor:
        """The Gram factor under the symmetric map ``transform``, grown to all rows."""
        factor = self._factors.setdefault(name, GramFactor(transform))
        for fresh in self._rows.since(len(factor)):
            factor.grow(fresh)
        return factor

    def outer(self) -> Float[Tensor, "d_in d_in"] | float:
        """Sum of the keys' outer products (0 where there are none), extended when rows are added."""
        done, total = self._outer
        for fresh in self._rows.since(done):
            total = total + fresh.T @ fresh
        self._outer = len(self), total
        return total
