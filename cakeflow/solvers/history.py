"""Keys of earlier edits, with what solvers derive from them grown row by row rather than computed again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.errors import NumericalError, ShapeError

Map = Callable[[Float[Tensor, "n d_in"]], Float[Tensor, "n d_in"]]
"""A linear map of keys, row by row."""


T = TypeVar("T")

RECENT = 2
"""Derived histories, and Gram factors, that a history keeps."""


class _Rows:
    """A matrix that rows are added to; its memory doubles when full, so that adding copies the new rows only.

    Remembers which rows came together: what is derived from them group by group has the same bits whenever it is done.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._size = 0
        self.ends: list[int] = []

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
        self.ends.append(end)

    def since(self, start: int) -> Iterator[Tensor]:
        """The rows from ``start`` on, as they came."""
        for end in self.ends:
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
        self._result: tuple[Tensor, T] | None = None

    def __call__(self, keys: Tensor) -> T:
        if self._result is None or not torch.equal(self._result[0], keys):
            self._result = keys.clone(), self._function(keys)
        return self._result[1]

    def forget(self) -> None:
        self._result = None


class _Recent(dict[Hashable, T]):
    """The ``RECENT`` entries that were used last, by name."""

    def use(self, name: Hashable, make: Callable[[], T]) -> T:
        """Return an entry, made anew if it is not there; one too many is the one that was not used for longest."""
        self[name] = self.pop(name) if name in self else make()
        while len(self) > RECENT:
            del self[next(iter(self))]
        return self[name]


class Growing(Protocol):
    """What a solver derives from a history: it takes in the keys of one batch after another.

    Its length is the number of keys that it has taken in.
    """

    def __len__(self) -> int: ...

    def grow(self, keys: Float[Tensor, "n d_in"], /) -> None:
        """Take in the keys of the next batch."""


G = TypeVar("G", bound=Growing)


class GramFactor:
    """The inverse of ``I + U U^T`` for the transformed rows U of a growing set of keys, as a whitened matrix.

    With ``L L^T = I + U U^T`` (Cholesky) the rows of ``Y = L^-1 U`` are all that is kept: what older keys take away
    from new ones is ``U_new Y^T Y``. New rows of Y are a by-product of the solve in which their keys were new. Where
    the factorisation fails no jitter is added: it would be a ridge that nobody asked for, so an error ends the batch.

    Args:
        transform: Linear map of keys, as rows, to U.
    """

    def __init__(self, transform: Map) -> None:
        self._transform = transform
        self._whitened = _Rows()
        self._border = _Last(self._new_rows)

    def __len__(self) -> int:
        return len(self._whitened)

    def _new_rows(self, keys: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n d_in"]]:
        """Return what new keys would add: the diagonal block of L and the rows of Y (Schur complement)."""
        rows = self._transform(keys)
        schur = torch.eye(len(rows), dtype=rows.dtype, device=rows.device) + rows @ rows.T
        if len(self):
            side = rows @ self._whitened.rows.T
            schur -= side @ side.T
            rows = torch.addmm(rows, side, self._whitened.rows, alpha=-1)
        corner, info = torch.linalg.cholesky_ex((schur + schur.T) / 2)
        if int(info) or not bool(torch.isfinite(corner).all()):
            raise NumericalError("the Gram matrix of the keys is not positive definite; set ridge higher")
        whitened = torch.linalg.solve_triangular(corner.T, rows.T, upper=True, left=False)  # spares a transposed copy
        return corner, whitened.T

    def grow(self, keys: Float[Tensor, "n d_in"]) -> None:
        """Take in more keys.

        Raises:
            NumericalError: If the grown matrix is not positive definite.
        """
        self._whitened.append(self._border(keys)[1])
        self._border.forget()

    def last_rows(self, keys: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """Rows of ``(I + U U^T)^-1 U`` that belong to new keys, the old ones counted in.

        Raises:
            NumericalError: If the grown matrix is not positive definite.
        """
        corner, whitened = self._border(keys)
        rows: Tensor = torch.linalg.solve_triangular(corner, whitened.T, upper=False, left=False)
        return rows.T


class KeyHistory:
    """The keys that earlier edits used at one weight, kept as rows (m x d_in), not as their d_in x d_in sum.

    Rows are what resuming, rolling back and exporting need, and they let a solve cost m instead of d_in. Each row
    belongs to one fact, and the rows of one edit batch stand together, so that a solver can weigh or drop them
    (``weighted``, ``without``).

    What solvers derive from the rows (``derive``, ``factor``, ``grown``) is cached by name and extended when rows are
    added. The two that were used last are kept of each kind, every one as large as the rows. A solver whose map changes
    from batch to batch, such as one with a growing ridge, has a new name each time and pays for all m rows, batch by
    batch.

    Args:
        keys: The first rows, if any.
    """

    def __init__(self, keys: Float[Tensor, "m d_in"] | None = None) -> None:
        self.facts: list[str] = []
        self._rows, self._values = _Rows(), _Rows()
        self._derived: _Recent[tuple[KeyHistory, _Last[Tensor]]] = _Recent()
        self._factors: _Recent[GramFactor] = _Recent()
        self._cached: _Recent[object] = _Recent()
        self._outer: tuple[int, Tensor | float] = 0, 0.0
        self._scaled: tuple[KeyHistory, Tensor] | None = None
        if keys is not None:
            self.append(keys)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def keys(self) -> Float[Tensor, "m d_in"] | None:
        """All rows, or None if there are none."""
        return self._rows.rows if len(self) else None

    @property
    def values(self) -> Float[Tensor, "m d_out"] | None:
        """The outputs that the keys were to get when they were new; None if they are not known of all."""
        return self._values.rows if 0 < len(self) == len(self._values) else None

    @property
    def batches(self) -> list[slice]:
        """The rows of each edit batch, oldest first."""
        ends = self._rows.ends
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def append(
        self,
        keys: Float[Tensor, "n d_in"],
        facts: Sequence[str] = (),
        values: Float[Tensor, "n d_out"] | None = None,
    ) -> None:
        """Add the keys of a committed batch.

        Args:
            keys: One row per fact.
            facts: The facts, by the hashes of their requests; unnamed by default.
            values: The outputs that the keys were to get.

        Raises:
            ShapeError: If there are names, but not one per row.
        """
        if facts and len(facts) != len(keys):
            raise ShapeError(f"{len(keys)} keys of {len(facts)} facts; a history needs one fact per key")
        self._scaled = None  # the new keys have no weight of the view's
        self._rows.append(keys)
        if values is not None:
            self._values.append(values.to(keys))
        self.facts += facts or [""] * len(keys)

    def weighted(self, weights: Float[Tensor, " m"]) -> KeyHistory:
        """The history in which each key counts ``weights`` times, in every solve: ``K^T diag(weights) K``.

        Args:
            weights: One per key, or one per batch; 0 or more.

        Raises:
            NumericalError: If a weight is negative or not finite.
            ShapeError: If there are neither as many weights as keys nor as batches.
        """
        sizes = torch.tensor([rows.stop - rows.start for rows in self.batches], dtype=torch.long)
        each = weights.repeat_interleave(sizes.to(weights.device)) if len(weights) == len(sizes) else weights
        if len(each) != len(self):
            raise ShapeError(f"{len(weights)} weights for {len(self)} keys in {len(sizes)} batches; give one per key")
        if not bool((each.isfinite() & (each >= 0)).all()):
            raise NumericalError(f"weights of keys must be finite and 0 or more, got {each.tolist()}")
        scale = each.sqrt()[:, None]
        result = self._choose(lambda each, rows: each[rows] * scale[rows].to(each))
        result._scaled = self, each
        return result

    def without(self, facts: Collection[str]) -> KeyHistory:
        """The history without the keys of some facts."""
        dropped = torch.tensor([fact in facts for fact in self.facts], dtype=torch.bool)
        return self._choose(lambda each, rows: each[rows][~dropped[rows]], dropped)

    def _choose(self, rows_of: Callable[[Tensor, slice], Tensor], dropped: Tensor | None = None) -> KeyHistory:
        """A history with some rows of each batch, of keys and of values."""
        result, values = KeyHistory(), self.values
        for rows in self.batches:
            keys = rows_of(self._rows.rows, rows)
            names = [name for at, name in enumerate(self.facts[rows], rows.start) if dropped is None or not dropped[at]]
            if len(keys):
                result.append(keys, names, None if values is None else rows_of(values, rows))
        return result

    def derive(
        self, name: Hashable, transform: Map, keys: Float[Tensor, "n d_in"]
    ) -> tuple[KeyHistory, Float[Tensor, "n d_in"]]:
        """The history of transformed keys, and ``keys`` transformed; only what is new since the last call is computed.

        Args:
            name: The result is cached under it; one name stands for one map, with all numbers that decide it.
            transform: The map.
            keys: Keys of the present batch, which are not in the history yet.
        """
        if self._scaled is not None:  # weights commute with a linear map, so the unweighted cache serves
            source, weights = self._scaled
            child, mapped = source.derive(name, transform, keys)
            return child.weighted(weights), mapped
        child, last = self._derived.use(name, lambda: (KeyHistory(), _Last(transform)))
        for fresh in self._rows.since(len(child)):
            child.append(last(fresh))
        return child, last(keys)

    def factor(self, name: Hashable, transform: Map) -> GramFactor:
        """The factor of ``I + U U^T`` for the rows under a linear map, grown to all of them.

        Args:
            name: The factor is cached under it; one name stands for one map, with all numbers that decide it.
            transform: The map of keys to rows of U.

        Raises:
            NumericalError: If that matrix is not positive definite.
        """
        return self._grow(self._factors.use(name, lambda: GramFactor(transform)))

    def grown(self, name: Hashable, make: Callable[[], G]) -> G:
        """What is derived from the rows batch by batch, grown to all of them.

        Args:
            name: It is cached under it; one name stands for one derivation, with all numbers that decide it.
            make: Makes it for no keys.
        """
        return self._grow(self.cached(name, make))

    def cached(self, name: Hashable, make: Callable[[], T]) -> T:
        """What belongs to the weight of these keys and does not change from batch to batch, made on first use.

        Args:
            name: It is cached under it, with all numbers that decide it.
            make: Makes it.
        """
        return self._cached.use(name, make)  # type: ignore[return-value]

    def _grow(self, part: G) -> G:
        for fresh in self._rows.since(len(part)):
            part.grow(fresh)
        return part

    def outer(self) -> Float[Tensor, "d_in d_in"] | float:
        """Sum of the keys' outer products (0 if there are none), extended when rows are added."""
        done, total = self._outer
        for fresh in self._rows.since(done):
            total = total + fresh.T @ fresh
        self._outer = len(self), total
        return total
