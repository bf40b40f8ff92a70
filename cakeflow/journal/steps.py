"""What one edit batch did."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from torch import Tensor

from cakeflow.data.request import EditRequest
from cakeflow.journal.ledger import canonical
from cakeflow.solvers.problem import Update


@dataclass(frozen=True, eq=False)
class LayerStep:
    """What one batch did to one layer.

    Attributes:
        layer: Index of the block.
        keys: n x d_in, the keys that were used.
        update: The change, as factors where it has low rank.
        numbers: Residual and update norms, as logged.
    """

    layer: int
    keys: Tensor
    update: Update
    numbers: dict[str, float]


@dataclass(eq=False)
class EditStep:
    """What one edit batch did.

    Attributes:
        requests: The facts; empty where their texts were not kept.
        layers: One entry per edited layer, in order.
        targets: Per request: loss, probability and steps of its target value.
        values: Anchor layer -> target values, n x d_out.
        numbers: What was logged of the batch.
        hashes: SHA-256 of each request.
        before: Layer -> SHA-256 of its weight before; ``after``: when the batch was committed.
        number: Its place among all batches that the journal was told of, those taken back counted in.
    """

    requests: tuple[EditRequest, ...]
    layers: list[LayerStep] = field(default_factory=list)
    targets: list[dict[str, float]] = field(default_factory=list)
    values: dict[int, Tensor] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    hashes: tuple[str, ...] = ()
    before: dict[int, str] = field(default_factory=dict)
    after: dict[int, str] = field(default_factory=dict)
    number: int = -1

    def __post_init__(self) -> None:
        self.hashes = self.hashes or tuple(map(request_hash, self.requests))


def request_hash(request: EditRequest) -> str:
    """SHA-256 of everything in a request."""
    return hashlib.sha256(canonical(request.to_dict())).hexdigest()
