"""Keys of earlier edits, with what solvers derive from them grown row by row rather than computed again."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.errors import NumericalError


class GramFactor:
    """Cholesky factor of ``I + K M K^T`` for a growing set of keys K and a fixed symmetric map M.

    Attributes:
        keys: m x d_in.
        mapped: m x d_in, ``K M``.
        lower: m x m, the factor.
    """

    def __init__(self, keys: Float[Tensor, "m d_in"], mapped: Float[Tensor, "m d_in"]) -> None:
        empty = keys[:0]
        self.keys, self.mapped, self.lower = empty, empty, keys.new_zeros(0, 0)
        self.grow(keys, mapped)

    def border(
        self, keys: Float[Tensor, "n d_in"], mapped: Float[Tensor, "n d_in"]
    ) -> tuple[Float[Tensor, "m n"], Float[Tensor, "n n"]]:
        """The rows that new keys would add to the factor: ``L^-1 K M K_new^T`` and the new diagonal block.

        Raises:
            NumericalError: If the grown matrix is not positive definite.
        """
        side = torch.linalg.solve_triangular(self.lower, self.keys @ mapped.T, upper=False)
        schur = torch.eye(len(keys), dtype=keys.dtype, device=keys.device) + keys @ mapped.T - side.T @ side
        corner, info = torch.linalg.cholesky_ex((schur + schur.T) / 2)
        if int(info) or not bool(torch.isfinite(corner).all()):
            raise NumericalError("the Gram matrix of the keys is not positive definite; set ridge higher")
        return side, corner

    def grow(self, keys: Float[Tensor, "n d_in"], mapped: Float[Tensor, "n d_in"]) -> None:
        """Take in more keys."""
        side, corner = self.border(keys, mapped)
        top = torch.cat([self.lower, torch.zeros_like(side)], 1)
        self.lower = torch.cat([top, torch.cat([side.T, corner], 1)])
        self.keys, self.mapped = torch.cat([self.keys, keys]), torch.cat([self.mapped, mapped])

    def last_rows(
        self, keys: Float[Tensor, "n d_in"], mapped: Float[Tensor, "n d_in"]
    ) -> Float[Tensor, "n d_in"]:
        """Rows of ``(I + K M K^T)^-1 K M`` that belong to new keys, the old ones counted in (Schur complement)."""
        side, corner = self.border(keys, mapped)
        back = torch.linalg.solve_triangular(self.lower.T, side, upper=True)
        return torch.cholesky_solve(mapped - back.T @ self.mapped, corner)


class KeyHistory:
    """The keys that earlier edits used at one layer, kept as rows (m x d_in), not as their d_in x d_in sum.

    Rows are what resuming, taking back and exporting need, and they let a solve cost m instead of d_in. Derived
    quantities are remembered by name and extended when rows are added.

    Args:
        keys: The first rows, if any.
    """

    def __init__(self, keys: Float[Tensor, "m d_in"] | None = None) -> None:
        self._keys = keys
        self._derived: dict[Hashable, KeyHistory] = {}
        self._factors: dict[Hashable, GramFactor] = {}
        self._outer: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return 0 if self._keys is None else len(self._keys)

    @property
    def keys(self) -> Float[Tensor, "m d_in"] | None:
        """All rows, or None where there are none."""
        return self._keys

    def append(self, keys: Float[Tensor, "n d_in"]) -> None:
        """Add the keys of a batch that was committed."""
        self._keys = keys if self._keys is None else torch.cat([self._keys, keys])

    def derive(self, name: Hashable, transform: Callable[[Tensor], Tensor]) -> KeyHistory:
        """The history of transformed keys; only rows added since the last call are transformed."""
        child = self._derived.setdefault(name, KeyHistory())
        if self._keys is not None and len(child) < len(self):
            child.append(transform(self._keys[len(child) :]))
        return child

    def factor(self, name: Hashable, transform: Callable[[Tensor], Tensor], like: Tensor) -> GramFactor:
        """The Gram factor under the symmetric map ``transform``, grown to all rows; ``like`` gives width and type."""
        factor = self._factors.setdefault(name, GramFactor(like[:0], like[:0]))
        if self._keys is not None and len(factor.keys) < len(self):
            fresh = self._keys[len(factor.keys) :]
            factor.grow(fresh, transform(fresh))
        return factor

    def outer(self) -> Float[Tensor, "d_in d_in"] | float:
        """Sum of the keys' outer products, extended when rows are added."""
        if self._keys is None:
            return 0.0
        done, total = self._outer or (0, self._keys.new_zeros(self._keys.shape[1], self._keys.shape[1]))
        fresh = self._keys[done:]
        self._outer = (len(self), total + fresh.T @ fresh)
        return self._outer[1]
