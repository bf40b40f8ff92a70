"""The keys that batches recorded at each place: as a history of the facts in force, and all of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from cakeflow.journal.steps import EditStep, out_of_force
from cakeflow.models.base import EditableModel
from cakeflow.solvers.history import KeyHistory

Keys = Mapping[int, Float[Tensor, "n d_in"]]
"""Number of a batch -> its keys at a place, one row for each that it recorded there."""


class Histories:
    """Place -> the keys of the facts in force, batch by batch, with the values that they were to get.

    The keys of a fact that was taken back or replaced leave the history, and come back with it. Keys that were read
    again (``renew``) stand in the place of those that were recorded, for as long as the batches that they were read
    behind are the journal's first ones.

    Args:
        model: The model; its input device has the keys.
    """

    def __init__(self, model: EditableModel) -> None:
        self._model = model
        self._at: dict[str, KeyHistory] = {}
        self._renewed: dict[str, Keys] = {}
        self._behind: tuple[int, ...] = ()

    def at(self, place: str) -> KeyHistory:
        """Keys of the facts in force at a place."""
        return self._at.setdefault(place, KeyHistory())

    def recorded(self, place: str, steps: Sequence[EditStep]) -> KeyHistory:
        """Keys of all facts at a place as these batches, all that there are, recorded them: in force or not."""
        if not self._renewed and not any(out_of_force(steps)):
            return self.at(place)
        history = KeyHistory()
        for step in steps:
            self._append(history, step, place, (), {})
        return history

    def add(self, step: EditStep, earlier: Sequence[EditStep]) -> None:
        """Take in a batch that follows on earlier ones."""
        if step.undone or step.replaced:
            self.rebuild([*earlier, step])
        else:
            self._take_in(step, ())

    def rebuild(self, steps: Sequence[EditStep]) -> None:
        """Have the keys of these batches only."""
        self._at.clear()
        if not self.is_renewed_behind(steps[: len(self._behind)]):
            self._renewed, self._behind = {}, ()
        for step, gone in zip(steps, out_of_force(steps), strict=True):
            self._take_in(step, gone)

    def follow(self, steps: Sequence[EditStep]) -> None:
        """Have the keys of these batches where the model is now: a Trainer may have moved it."""
        if any(each.keys is not None and each.keys.device != self._model.device for each in self._at.values()):
            self.rebuild(steps)

    def renew(self, keys: Mapping[str, Keys], behind: Sequence[EditStep], steps: Sequence[EditStep]) -> None:
        """Have other keys in the place of recorded ones.

        Args:
            keys: Place -> the keys of each batch.
            behind: The batches behind which they were read.
            steps: All batches; these are the first of them.
        """
        self._renewed, self._behind = dict(keys), tuple(step.number for step in behind)
        self.rebuild(steps)

    def is_renewed_behind(self, steps: Sequence[EditStep]) -> bool:
        """True if the keys were last read again behind exactly these batches; behind none, if they never were."""
        return self._behind == tuple(step.number for step in steps)

    def of(self, keys: Keys, place: str, steps: Sequence[EditStep]) -> KeyHistory:
        """The history at a place, had these keys been recorded there."""
        history = KeyHistory()
        for step, gone in zip(steps, out_of_force(steps), strict=True):
            self._append(history, step, place, gone, keys)
        return history

    def _take_in(self, step: EditStep, gone: Collection[str]) -> None:
        for place in step.places:
            self._append(self.at(place), step, place, gone, self._renewed.get(place, {}))

    def _append(self, history: KeyHistory, step: EditStep, place: str, gone: Collection[str], other: Keys) -> None:
        """Add the keys of a batch at a place, but those of some facts; of several changes there, the last one's."""
        changes = [part.change for part in step.changes if part.place == place]
        recorded = changes[-1].preserved_keys() if changes else None
        if recorded is None:
            return
        keys, values = other.get(step.number, recorded), changes[-1].preserved_values()
        if not any(name in gone for name in step.key_hashes):
            history.append(keys.to(self._model.device), step.key_hashes, values)
        elif rows := [row for row, name in enumerate(step.key_hashes) if name not in gone]:
            names = [step.key_hashes[row] for row in rows]
            history.append(keys[rows].to(self._model.device), names, None if values is None else values[rows])
