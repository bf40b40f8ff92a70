"""Layouts of an edited weight in a delta: whole, as the factors of its changes, or as the entries that differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from cakeflow.solvers.problem import Update
from cakeflow.storage.typed import Count, Schema

BLOCK = 2**16
"""Entries of a weight that are computed at a time: small enough for a processor's cache."""
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Size of a number in bytes -> the type that shows its bits."""
Kind = Literal["dense", "factors", "sparse"]


class Layout(Schema):
    """Layout of a weight in a delta.

    Attributes:
        layout: ``dense``, the weight itself; ``factors``, a left and a right factor for each change of it; ``sparse``,
            the entries that differ from the base.
        ranks: Rank of each change, in the order in which they were made (``factors``).
        entries: Number of entries that are given by themselves, whatever the factors say of them.
        bytes: Size of the tensors in the file.
        saved: Size of the weight itself less that.
    """

    layout: Kind
    ranks: list[Annotated[int, Field(ge=1, lt=2**31)]] = Field(default_factory=list)
    entries: Count = 0
    bytes: Count
    saved: Count


class Layouts(Schema):
    """Details of a delta's manifest: the layout of each weight by its name."""

    layouts: dict[str, Layout]


def summary(layouts: Mapping[str, Layout]) -> str:
    """Return layouts, ranks and size in words, for a card.

    Example:
        >>> summary({"a": Layout(layout="factors", ranks=[2, 1], bytes=240, saved=760)})
        '1 as factors of rank 3; 240 bytes, 760 fewer than the weights (76 %)'
    """
    kinds = []
    for kind in ("factors", "sparse", "dense"):
        some = [each for each in layouts.values() if each.layout == kind]
        ranks = ", ".join(map(str, sorted({sum(each.ranks) for each in some})))
        ends = {"factors": f"as factors of rank {ranks}", "sparse": "as the entries that differ", "dense": "whole"}
        kinds += [f"{len(some)} {ends[kind]}"] if some else []
    size, saved = sum(each.bytes for each in layouts.values()), sum(each.saved for each in layouts.values())
    share = 100 * saved / max(1, size + saved)
    return f"{', '.join(kinds)}; {size:,} bytes, {saved:,} fewer than the weights ({share:.0f} %)"


def packed(
    original: Float[Tensor, "d_out d_in"], edited: Float[Tensor, "d_out d_in"], updates: Sequence[Update]
) -> tuple[Layout, dict[str, Tensor]]:
    """Return the smallest layout from which ``unpacked`` gives the bits of an edited weight, and its tensors by part.

    Whatever the factors do not give again, bit for bit, is held entry by entry. Factors in float32 leave more of these
    than factors in float64, which are twice as large; both are tried where that can pay.

    Args:
        original: The weight before any edit.
        edited: The weight now.
        updates: The changes that were made of it, oldest first.
    """
    original, edited = original.detach().cpu().contiguous(), edited.detach().cpu().contiguous()
    smallest = min({"": edited}, _entries(original, edited), key=_size)  # of equal ones the first
    if updates and all(update.left is not None for update in updates):
        for dtype in (torch.float32, torch.float64):
            factors = _factors(updates, dtype)
            if _size(factors) < _size(smallest):
                replayed = _replayed(original, factors, [len(each.right) for each in updates])
                smallest = min(smallest, factors | _entries(replayed, edited), key=_size)
    kind: Kind = "dense" if "" in smallest else "factors" if "left" in smallest else "sparse"
    layout = Layout(
        layout=kind,
        ranks=[len(each.right) for each in updates] if kind == "factors" else [],
        entries=len(smallest.get("values", ())),
        bytes=_size(smallest),
        saved=edited.nbytes - _size(smallest),
    )
    return layout, smallest


def unpacked(
    original: Float[Tensor, "d_out d_in"], layout: Layout, parts: Mapping[str, Tensor]
) -> Float[Tensor, "d_out d_in"]:
    """Return the edited weight, the same bits on any machine.

    Args:
        original: The weight before any edit; of any shape where the delta holds it whole.
        layout: How the delta holds it.
        parts: Its tensors by part.

    Raises:
        ValueError: If they are not what the layout says, or do not fit the weight.
    """
    original = original.detach().cpu().contiguous()
    _require_parts(original, layout, parts)
    if layout.layout == "dense":
        return parts[""]
    edited = _replayed(original, parts, layout.ranks) if layout.ranks else original.clone()
    if layout.entries:
        places = _positions(parts["places"], edited.numel())
        if len(places) != layout.entries:
            raise ValueError(f"{len(places)} places for {layout.entries} entries")
        edited.view(-1)[places] = parts["values"]
    return edited


def _require_parts(original: Tensor, layout: Layout, parts: Mapping[str, Tensor]) -> None:
    """Check names, types, shapes and sizes, which decide about memory and time, before any tensor is used."""
    d_out, d_in, rank, kind = original.shape[0], original.shape[-1], sum(layout.ranks), layout.layout
    if (kind == "factors") != bool(layout.ranks) or (kind == "dense" and layout.entries):
        raise ValueError(f"{kind} with ranks {layout.ranks[:5]} and {layout.entries} entries")
    shapes: dict[str, tuple[int, ...]] = {"": tuple(original.shape)} if kind == "dense" else {}
    shapes |= {"left": (rank, d_out), "right": (rank, d_in)} if layout.ranks else {}
    shapes |= {"values": (layout.entries,)} if layout.entries else {}
    others = {part: tuple(each.shape) for part, each in parts.items() if part != "places"}
    if others != shapes or ("places" in parts) != bool(layout.entries):
        raise ValueError(f"it has {sorted(others.items())} where {sorted(shapes.items())} belong")
    types = {part: each.dtype for part, each in parts.items() if part != "places"}
    factors = {types.pop("left", torch.float32), types.pop("right", torch.float32)}
    if factors not in ({torch.float32}, {torch.float64}) or set(types.values()) - {original.dtype}:
        raise ValueError(f"numbers of other types: {', '.join(str(each.dtype) for each in parts.values())}")
    if (layout.bytes, layout.bytes + layout.saved) != (_size(parts), original.nbytes):
        raise ValueError(f"{_size(parts)} bytes, where the manifest says {layout.bytes}")


def _factors(updates: Sequence[Update], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the factors of all changes, one below the other."""
    lefts = [update.left.cpu().to(dtype) for update in updates if update.left is not None]
    rights = [update.right.cpu().to(dtype) for update in updates]
    return {"left": torch.cat(lefts), "right": torch.cat(rights)}


def _replayed(original: Tensor, factors: Mapping[str, Tensor], ranks: Sequence[int]) -> Tensor:
    """Make the changes again, each with one rounding per entry, as a ``WeightChange`` does.

    Products are added up in float64 one by one, rank by rank. So every bit follows from IEEE 754, where the order of
    sums in a matrix product is up to library, processor and number of threads.
    """
    left, right = factors["left"].double(), factors["right"].double()
    half = original.dtype in (torch.float16, torch.bfloat16)
    ends, edited = np.cumsum([0, *ranks]).tolist(), torch.empty_like(original)
    for rows in torch.arange(len(original)).split(max(1, BLOCK // original.shape[1])):
        some = slice(int(rows[0]), int(rows[-1]) + 1)
        block = original[some].float() if half else original[some]
        columns, product = left[:, some, None], torch.empty(block.shape, dtype=torch.float64)
        for start, end in pairwise(ends):
            change = torch.zeros_like(product)
            for row in range(start, end):
                change += torch.mul(columns[row], right[row], out=product)
            block = (block.double() + change).to(block.dtype)
        edited[some] = block.to(original.dtype)
    return edited


def _entries(given: Tensor, edited: Tensor) -> dict[str, Tensor]:
    """Return places and values of the entries in which two weights differ in any bit; nothing if they are equal."""
    bits = BITS[edited.element_size()]
    differ = given.view(bits) != edited.view(bits)
    return {"places": _places(differ), "values": edited[differ]} if differ.any() else {}


def _places(mask: Bool[Tensor, "d_out d_in"]) -> Tensor:
    """Return the numbers of the entries in row order, or a bit for each entry where that is smaller."""
    numbers = mask.flatten().nonzero()[:, 0].to(torch.int32 if mask.numel() < 2**31 else torch.int64)
    bits = torch.from_numpy(np.packbits(mask.numpy()))
    return numbers if numbers.nbytes < bits.nbytes else bits


def _positions(places: Tensor, size: int) -> Tensor:
    """Return the numbers of the entries that ``_places`` gave, in ascending order.

    Raises:
        ValueError: If they repeat, are out of order, or lie outside the weight.
    """
    if places.dtype == torch.uint8 and places.shape == ((size + 7) // 8,):
        numbers = torch.from_numpy(np.unpackbits(places.numpy())).nonzero()[:, 0]
    elif places.dtype in (torch.int32, torch.int64) and places.dim() == 1:
        numbers = places.long()
    else:
        raise ValueError(f"places are {places.dtype} {tuple(places.shape)}")
    if len(numbers) and (numbers[0] < 0 or numbers[-1] >= size or (numbers.diff() <= 0).any()):
        raise ValueError(f"places that are not ascending numbers below {size}")
    return numbers


def _size(parts: Mapping[str, Tensor]) -> int:
    return sum(each.nbytes for each in parts.values())
