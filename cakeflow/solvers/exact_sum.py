"""Sums of second moments in fixed point: their bits depend on the terms, not on the order or the grouping."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cakeflow.errors import NumericalError

HIGH = 12
"""The first word of an entry counts units of 2^-12."""
LOW = 46
"""The second word counts units of 2^-(12 + 46), about 3.5e-18, in what the first one leaves."""
LIMIT = 2**62
"""The first word stays below it, so that two of them can be added; in value 2^50, about 1.1e15."""
MOST_TERMS = 2**17
"""Most terms of a sum: each adds at most 2^45 to a second word."""
STRIP = 32
"""Rows that are worked on at a time, so that they stay in the processor's cache."""


class ExactSum:
    """Sum of symmetric positive semi-definite matrices as integers, which add up to the same bits in any order.

    Each term is rounded once, to units of 2^-58, whatever the others are. That is below the last bit of a float64
    above 0.03; a term in float32 keeps all its bits down to entries of 3e-11. An entry takes two words of 64 bits. As
    the matrix is symmetric, the first words are kept on and above the diagonal of a matrix with one row more, and the
    second ones, transposed, below: d (d + 1) words, as many as a float64 sum would take.

    The scale is a constant rather than fitted to the data, so that jobs need not agree on one before they begin. It
    serves keys of any model: a massive activation of 1e6 fits a thousand times, and takes no bits from other entries.

    Args:
        words: The words, int64, (d + 1) x d.
        count: Number of terms.
    """

    def __init__(self, words: Int[Tensor, "rows d"], count: int = 0) -> None:
        self.words, self.count = words, count

    @classmethod
    def zeros(cls, width: int, device: torch.device | str = "cpu") -> ExactSum:
        """Return the empty sum of ``width`` x ``width`` matrices."""
        return cls(torch.zeros(width + 1, width, dtype=torch.int64, device=device))

    def __len__(self) -> int:
        return self.words.shape[1]

    def add(self, term: Float[Tensor, "d d"]) -> None:
        """Add a matrix.

        Args:
            term: Symmetric and positive semi-definite, so that no entry is larger than the largest on the diagonal.

        Raises:
            NumericalError: If it is not finite, the sum would be too large, or has ``MOST_TERMS`` terms already.
        """
        largest = float(term.diagonal().amax())
        if not largest < LIMIT / 2**HIGH:  # nor if it is not a number
            raise NumericalError("is not finite" if not largest < float("inf") else _excess(largest))
        self._require(1)
        for rows, rest in self._strips():
            entries = term[rows, rest].double().triu().mul_(2.0**HIGH)
            first = entries.round()
            second = entries.sub_(first).mul_(2.0**LOW).round_()  # exact but for this last rounding
            self._first(rows, rest).add_(first.long())
            self._second(rows, rest).add_(second.long())
        self._close(1)

    def join(self, other: ExactSum) -> None:
        """Add the terms of another sum.

        Raises:
            NumericalError: If the sum would be too large, or have more than ``MOST_TERMS`` terms.
        """
        self._require(other.count)
        self.words.add_(other.words.to(self.words.device))
        self._close(other.count)

    @property
    def largest(self) -> int:
        """The largest first word, which is one of the diagonal's."""
        return int(self.words[:-1].diagonal().amax())

    def value(self) -> Float[Tensor, "d d"]:
        """Return the sum in float64, symmetric to the bit."""
        result = torch.empty(len(self), len(self), dtype=torch.float64, device=self.words.device)
        for rows, rest in self._strips():
            part = self._second(rows, rest).double().mul_(2.0**-LOW).add_(self._first(rows, rest)).mul_(2.0**-HIGH)
            square = part[:, : len(part)].triu()
            part[:, : len(part)] = square + square.triu(1).T
            result[rows, rest], result[rest, rows] = part, part.T
        return result

    def _strips(self) -> Iterator[tuple[slice, slice]]:
        """Yield some rows at a time, with the columns from the diagonal on."""
        width = len(self)
        return ((slice(i, min(i + STRIP, width)), slice(i, width)) for i in range(0, width, STRIP))

    def _first(self, rows: slice, rest: slice) -> Int[Tensor, "rows rest"]:
        """The first words; what is left of the diagonal belongs to second words."""
        return self.words[rows, rest]

    def _second(self, rows: slice, rest: slice) -> Int[Tensor, "rows rest"]:
        """The second words; what is left of the diagonal belongs to first words."""
        return self.words[rest.start + 1 :, rows].T

    def _require(self, terms: int) -> None:
        if self.count + terms > MOST_TERMS:
            raise NumericalError(f"is a sum of {self.count + terms} blocks, and has room for {MOST_TERMS}")

    def _close(self, terms: int) -> None:
        self.count += terms
        require_room(self.largest)


def require_room(largest: int) -> None:
    """Check that a sum with this largest first word, or with several that are added up, is none too many.

    Raises:
        NumericalError: If it is.
    """
    if not 0 <= largest < LIMIT:
        raise NumericalError(_excess(largest / 2**HIGH))


def _excess(largest: float) -> str:
    return f"has a sum of squares of {largest:.1e}, and the limit is {LIMIT / 2**HIGH:.1e}"
