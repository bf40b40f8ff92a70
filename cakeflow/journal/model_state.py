"""The model in memory as its journal left it: what somebody else changes meanwhile is noticed, and never undone."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from cakeflow.errors import ConfigError, ModelChangedError, listed
from cakeflow.journal.changes import Change
from cakeflow.models.base import EditableModel
from cakeflow.models.shards import local
from cakeflow.storage.hashing import tensor_hashes


def require_plain_mode(action: str) -> None:
    """Check that no block around decides how numbers are computed.

    Args:
        action: What is about to begin.

    Raises:
        ConfigError: Inside ``torch.autocast`` or ``torch.inference_mode``.
    """
    modes = [f"torch.autocast({kind!r})" for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    modes += ["torch.inference_mode()"] if torch.is_inference_mode_enabled() else []
    if modes:
        raise ConfigError(f"{action} inside {' and '.join(modes)} would give other weights; leave that block first")


class ModelState:
    """Hashes of a model's tensors as the journal left them.

    Args:
        model: The model.
        edited: Place -> a change of it, of all places that were edited; the journal adds to it.
    """

    def __init__(self, model: EditableModel, edited: Mapping[str, Change]) -> None:
        self._model, self._edited = model, edited
        self._hashes: dict[str, str] = {}
        self._others: dict[str, str] = {}
        self._reverted = 0

    def record(self, hashes: Mapping[str, str]) -> None:
        """Record the content of edited places: place -> its hash."""
        self._hashes |= hashes

    def check(self, places: Iterable[str] | None = None) -> None:
        """Compare edited places (default: all) with their recorded hashes.

        Raises:
            ModelChangedError: Naming the places that differ.
        """
        recorded = [place for place in (self._edited if places is None else places) if place in self._hashes]
        _require_none([place for place in recorded if self._edited[place].hash(self._model) != self._hashes[place]])

    def check_all(self, *, record: bool = True) -> None:
        """Compare every tensor of the model, those outside the edited places with what they were when first recorded.

        Args:
            record: Whether tensors are recorded that were not before.

        Raises:
            ModelChangedError: Naming those that differ, are new, or are gone.
        """
        self.check()
        if not (record or self._others):
            return
        tensors: dict[str, Tensor] = {name: local(each) for name, each in self._model.model.state_dict().items()}
        states = [change.state(self._model).values() for change in self._edited.values()]
        tied = {local(each).data_ptr() for state in states for each in state}
        inside = {name for name, tensor in tensors.items() if tensor.is_meta or tensor.data_ptr() in tied}
        inside |= {name for name in self._others for place in self._edited if f"{name}.".startswith(f"{place}.")}
        others = tensor_hashes({name: tensor for name, tensor in tensors.items() if name not in inside})
        if self._others:
            names = [name for name in {**self._others, **others} if name not in inside]
            _require_none([name for name in names if others.get(name) != self._others.get(name)])
        self._others |= others

    def require_ready(self, action: str, *, busy: bool, everything: bool = False) -> None:
        """Check that the model may be changed now, and is as the journal left it.

        Args:
            action: What is about to begin.
            busy: Whether a batch is open.
            everything: Whether all tensors are compared, and numbers must be computed in a plain mode.

        Raises:
            ConfigError: If a batch is open, or the model is reverted.
            ModelChangedError: If somebody else changed it.
        """
        if everything:
            require_plain_mode(action)
        if self._reverted:
            raise ConfigError(f"{action} inside reverted(): the model is unedited for a while; leave that block first")
        if busy:
            raise ConfigError(f"{action} inside a batch, which is not committed yet; wait for its end")
        self.check_all() if everything else self.check()

    @contextmanager
    def reverting(self) -> Iterator[None]:
        """Mark the model as reverted; warn at the end of what was changed meanwhile at edited places: it is lost."""
        hashes = {place: change.hash(self._model) for place, change in self._edited.items()}
        self._reverted += 1
        try:
            yield
        finally:
            self._reverted -= 1
            lost = [place for place, value in hashes.items() if self._edited[place].hash(self._model) != value]
            if lost:
                warnings.warn(
                    f"{listed(lost)} changed inside reverted(); the edited content comes back there, and that change "
                    "is lost: change a model outside of that block",
                    stacklevel=4,
                )


def _require_none(changed: list[str]) -> None:
    if changed:
        raise ModelChangedError(
            f"{listed(changed)}: changed by somebody else (trained, cast, or edited by another editor) since the "
            "journal did; nothing was done. Put back what was there, or, to keep it, give the model to a new Editor"
        )
