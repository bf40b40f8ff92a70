"""By how much the changes of two runs differ, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.core.recorded import RecordedRun
from cakeflow.journal.changes import Change, WeightChange
from cakeflow.journal.ledger import Entry
from cakeflow.journal.store import JournalStore

UNKNOWN = (math.nan, math.nan)


@dataclass
class Sizes:
    """Differences between the changes of a run and of its repetition; batches are given in order.

    Attributes:
        recorded: Where the tensors of the run are; None if they are not there.
        repeated: Where those of the repetition are.
        norms: Place -> Frobenius norm of the unedited weight, as far as it was met.
        apart: Place -> what its weight is apart so far, d_out x d_in.
    """

    recorded: JournalStore | None
    repeated: JournalStore
    norms: dict[str, float] = field(default_factory=dict)
    apart: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, run: RecordedRun, repeated: RecordedRun) -> Sizes:
        """The differences between a run and its repetition, none of whose tensors are read yet."""
        sizes = cls(JournalStore(run.path.parent) if run.has_tensors else None, JournalStore(repeated.path.parent))
        for entry in sizes.repeated.ledger.entries if sizes.recorded else ():
            if entry.kind == "batch":
                originals = sizes.repeated.originals(entry)
                sizes.norms |= {
                    name: float(torch.linalg.vector_norm(each.double())) for name, each in originals.items()
                }
        return sizes

    def of_batch(
        self, recorded: Entry | None, repeated: Entry | None, places: Sequence[str]
    ) -> dict[str, tuple[float, float]]:
        """Return for each place that differs after a batch how far the batch's change and the whole weight are apart.

        Args:
            recorded: The entry of the batch; None if the run has none here.
            repeated: That of its repetition.
            places: The places.

        Returns:
            Frobenius norm of the difference of the changes over that of the recorded change, and that of the weights
            over that of the unedited weight; nan where it cannot be told.

        Raises:
            LedgerError: If a file is not the one that was written.
        """
        if self.recorded is None or not places:
            return dict.fromkeys(places, UNKNOWN)
        pairs = ((self.recorded, recorded), (self.repeated, repeated))
        one, other = (
            [part.change for part in store.read_step(entry).changes] if entry else [] for store, entry in pairs
        )
        return {place: self._of_place(place, _at(one, place), _at(other, place)) for place in places}

    def _of_place(self, place: str, recorded: list[Change], repeated: list[Change]) -> tuple[float, float]:
        if not all(isinstance(each, WeightChange) for each in (*recorded, *repeated)):
            return _of_tensors(recorded, repeated), math.nan
        one, other = _sum(recorded), _sum(repeated)
        difference = other - one
        self.apart[place] = difference + self.apart.get(place, 0)
        whole = _ratio(float(self.apart[place].norm()), self.norms.get(place, 0.0))
        return _ratio(float(difference.norm()), float(one.norm())), whole


def _at(changes: Iterable[Change], place: str) -> list[Change]:
    return [each for each in changes if each.place == place]


def _sum(changes: Iterable[Change]) -> Float[Tensor, "d_out d_in"]:
    """The sum of the updates of weight changes in float64; a single zero if there are none."""
    total = torch.zeros((), dtype=torch.float64)
    for each in changes:
        total = total + each.update.dense.double() if isinstance(each, WeightChange) else total
    return total


def _ratio(difference: float, scale: float) -> float:
    return difference / scale if scale else math.nan


def _of_tensors(recorded: Sequence[Change], repeated: Sequence[Change]) -> float:
    """Relative difference of all tensors of changes that are no updates; nan if their shapes differ."""
    one, other = (
        {f"{index}/{name}": each for index, change in enumerate(changes) for name, each in change.tensors().items()}
        for changes in (recorded, repeated)
    )
    if {name: each.shape for name, each in one.items()} != {name: each.shape for name, each in other.items()}:
        return math.nan
    difference = sum(float((each.double() - other[name].double()).square().sum()) for name, each in one.items())
    return _ratio(difference**0.5, sum(float(each.double().square().sum()) for each in one.values()) ** 0.5)
