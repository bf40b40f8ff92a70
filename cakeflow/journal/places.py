"""The places of a model that were edited: what they held before, and how they are restored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from cakeflow.errors import ConfigError, ResumeError
from cakeflow.journal.changes import Change
from cakeflow.journal.steps import EditStep
from cakeflow.models.base import EditableModel
from cakeflow.models.shards import whole

DIFFERENT = "do not come out as recorded: another machine, library or number of threads; edit again there"


class EditedPlaces:
    """The edited places of one model.

    Attributes:
        model: The model.
        originals: Place -> its content before any edit, as ``Change.read`` returned it.
        first: Place -> the first change of it, which reads and restores it.

    Args:
        model: The model.
    """

    def __init__(self, model: EditableModel) -> None:
        self.model = model
        self.originals: dict[str, Any] = {}
        self.first: dict[str, Change] = {}

    def touch(self, change: Change) -> None:
        """Keep the original of a place that was never edited.

        Raises:
            ConfigError: If another place that was edited lies inside this one, or around it.
        """
        place = change.place
        if place not in self.originals:
            for other in self.originals:
                if place.startswith(f"{other}.") or other.startswith(f"{place}."):
                    raise ConfigError(
                        f"{place} cannot be edited: {other} was, and one lies inside the other; roll back"
                    )
            self.originals[place], self.first[place] = change.read(self.model), change

    def forget_all_but(self, known: set[str]) -> None:
        """Treat all other places, restored, as never edited."""
        for place in set(self.originals) - known:
            del self.originals[place], self.first[place]

    def original(self, place: str) -> dict[str, Tensor]:
        """Tensors that a place held before any edit; empty if it was not edited."""
        return self.first[place].original(self.originals[place]) if place in self.originals else {}

    def state(self) -> dict[str, Tensor]:
        """The model's tensors at all edited places, by their names in its state dict."""
        states = [change.state(self.model) for change in self.first.values()]
        return {name: whole(each) for state in states for name, each in state.items()}

    def hash(self, place: str) -> str:
        """SHA-256 of the content of an edited place."""
        return self.first[place].hash(self.model)

    def hashes(self, places: Iterable[str]) -> dict[str, str]:
        """The hash of each of these places that is edited."""
        return {place: self.hash(place) for place in places if place in self.first}

    def require(self, hashes: Mapping[str, str], label: str) -> None:
        """Check that places have these hashes.

        Raises:
            ResumeError: If one of them was not edited or holds something else.
        """
        differing = [p for p, expected in hashes.items() if p not in self.first or self.hash(p) != expected]
        if differing:
            raise ResumeError(f"{label}: the weights of {', '.join(differing)} {DIFFERENT}")

    def read(self) -> dict[str, Any]:
        """The present content of every edited place, for ``put``."""
        return {place: change.read(self.model) for place, change in self.first.items()}

    def put(self, contents: Mapping[str, Any]) -> None:
        """Restore the content of some places."""
        for place, content in contents.items():
            self.first[place].undo(self.model, content)

    def restore(self, places: set[str], steps: Sequence[EditStep], *, rehash: bool = False) -> None:
        """Put originals back, then make the steps' changes at these places again; ``rehash`` renews their hashes."""
        self.put({place: content for place, content in self.originals.items() if place in places})
        for step in steps:
            touched = [place for place in step.places if place in places and rehash]
            step.before.update(self.hashes(touched))
            for part in step.changes:
                if part.place in places:
                    part.change.apply(self.model)
            step.after.update(self.hashes(touched))
