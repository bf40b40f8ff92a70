"""One committed edit batch: its requests, changes and numbers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from torch import Tensor

from cakeflow.data.request import EditRequest
from cakeflow.journal.changes import Change
from cakeflow.journal.ledger import canonical
from cakeflow.journal.schema import TargetBody


@dataclass(frozen=True, eq=False)
class AppliedChange:
    """A change as a batch made it.

    Attributes:
        change: The change.
        numbers: What was logged of it.
    """

    change: Change
    numbers: dict[str, float]

    @property
    def place(self) -> str:
        """Name of the parameter or module that was changed."""
        return self.change.place


@dataclass(eq=False)
class EditStep:
    """One edit batch.

    Attributes:
        requests: The facts; empty if their texts were not stored.
        changes: The changes, in the order in which they were made.
        targets: How the target search of each request ended, layer by layer.
        values: Layer -> target values at its value site, n x d_out.
        numbers: What was logged of the batch.
        hashes: SHA-256 of each request.
        before: Place -> SHA-256 of its content before the batch.
        after: Place -> the same when the batch was committed.
        inputs: Name -> SHA-256 of what the batch was solved with beside requests and settings.
        number: Number of the batch in its journal; rolled-back batches keep theirs. -1 until it is committed.
    """

    requests: tuple[EditRequest, ...]
    changes: list[AppliedChange] = field(default_factory=list)
    targets: list[TargetBody] = field(default_factory=list)
    values: dict[int, Tensor] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    hashes: tuple[str, ...] = ()
    before: dict[str, str] = field(default_factory=dict)
    after: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    number: int = -1

    def __post_init__(self) -> None:
        self.hashes = self.hashes or tuple(map(request_hash, self.requests))

    @property
    def places(self) -> list[str]:
        """The changed places, each once, in order."""
        return [*dict.fromkeys(part.place for part in self.changes)]


def request_hash(request: EditRequest) -> str:
    """SHA-256 of everything in a request."""
    return hashlib.sha256(canonical(request.to_dict())).hexdigest()
