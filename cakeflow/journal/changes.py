"""The kinds of changes that an edit makes to a model: each can be applied, undone, hashed and stored."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import isabstract
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cakeflow.errors import LedgerError, NumericalError, ShapeError
from cakeflow.models.base import EditableModel
from cakeflow.models.shards import whole, write
from cakeflow.solvers.problem import Update
from cakeflow.storage.hashing import tensor_hash


class Change(ABC):
    """One reversible change at one place of a model.

    Changes at a place are made one on top of another, and undone all at once: the place gets its original back, then
    the remaining changes are applied again. So journal, audit, resume, rollback and export need not know the kind.
    A kind is stored under the name of its class; one of a plugin is found once the plugin is imported.

    Attributes:
        place: Name of the parameter or module that is changed.
    """

    place: str
    stands_alone = True
    """Whether the change is the same without those that were made before it at its place."""

    def preserved_keys(self) -> Float[Tensor, "n d_in"] | None:
        """Return one key per request, which later edits at this place should preserve; None by default."""
        return None

    def preserved_values(self) -> Float[Tensor, "n d_out"] | None:
        """Return the output of the place that each of these keys is to keep; None by default."""
        return None

    @abstractmethod
    def apply(self, model: EditableModel) -> None:
        """Make the change, on top of what the place holds now.

        Raises:
            NumericalError: If the place does not hold finite numbers afterwards; it is left so, to be undone.
        """

    @abstractmethod
    def read(self, model: EditableModel) -> Any:
        """Return the content of the place, for ``undo``."""

    @abstractmethod
    def undo(self, model: EditableModel, content: Any) -> None:
        """Put back what ``read`` returned earlier."""

    @abstractmethod
    def state(self, model: EditableModel) -> dict[str, Tensor]:
        """Return the content of the place, as tensors by their names in the model's state dict."""

    @abstractmethod
    def original(self, content: Any) -> dict[str, Tensor]:
        """Return the tensors to store of the place before any change; none if the unedited model has them all."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything that is needed to make the change again."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, place: str, tensors: Mapping[str, Tensor]) -> Change:
        """The change at a place that ``tensors`` gave."""

    def hash(self, model: EditableModel) -> str:
        """SHA-256 of what the place holds now."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state(model).items()):
            digest.update(f"{name} {tensor_hash(tensor)}\n".encode())
        return digest.hexdigest()


def kind_of(name: str) -> type[Change]:
    """The kind of change that is stored under a name.

    Raises:
        LedgerError: If there is none.
    """
    kinds = {kind.__name__: kind for kind in _kinds(Change) if not isabstract(kind)}  # type: ignore[type-abstract]
    if name not in kinds:
        raise LedgerError(
            f"a change of kind {name!r}: known are {', '.join(sorted(kinds))}; import the plugin that has this one"
        )
    return kinds[name]


def _kinds(base: type[Change]) -> list[type[Change]]:
    return [base, *(kind for child in base.__subclasses__() for kind in _kinds(child))]


@final
@dataclass(frozen=True, eq=False)
class WeightChange(Change):
    """An update added to a weight.

    Half-precision weights get a float32 master that collects the updates, so that small ones are not lost.

    Attributes:
        place: Name of the weight.
        update: The update, as factors where it has low rank.
        keys: n x d_in, the keys that it was solved for; no rows if it was made when a run ended.
        values: n x d_out, the output of the weight that each key was to get; None where they were not noted.
    """

    place: str
    update: Update
    keys: Float[Tensor, "n d_in"] = field(default_factory=lambda: torch.empty(0, 0))
    values: Float[Tensor, "n d_out"] | None = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def apply(self, model: EditableModel) -> None:
        """Add the update, some rows at a time, with one rounding per entry.

        Raises:
            ShapeError: If the update is not of the weight's shape.
            NumericalError: If the weight is not finite afterwards.
        """
        weight = whole(model.weight(self.place).detach())
        if weight.dtype in (torch.float16, torch.bfloat16) and self.place not in model.masters:
            model.masters[self.place] = weight.float()
        master = model.masters.get(self.place, weight)
        oriented = model.oriented(self.place, master)
        if oriented.shape != self.update.shape:
            raise ShapeError(
                f"{self.place} is {tuple(oriented.shape)}, but its update is {self.update.shape}; a change belongs to "
                "the model that it was made for"
            )
        for rows, part in self.update.to(weight.device).rows():
            oriented[rows] = oriented[rows].double() + part
        write(model.weight(self.place), master)
        if not torch.isfinite(master.to(weight.dtype)).all():
            raise NumericalError(
                f"{self.place}: the edited weight is not finite in {weight.dtype}; set ridge higher or load the model "
                "in float32"
            )

    def preserved_keys(self) -> Float[Tensor, "n d_in"] | None:
        """Return the keys, if there are any."""
        return self.keys if len(self.keys) else None

    def preserved_values(self) -> Float[Tensor, "n d_out"] | None:
        """Return the values of the keys."""
        return self.values

    def read(self, model: EditableModel) -> tuple[Tensor, Tensor | None]:
        """The weight on the CPU, as the module has it, and its master."""
        return whole(model.weight(self.place).detach()).cpu().clone(), model.masters.get(self.place)

    @torch.no_grad()
    def undo(self, model: EditableModel, content: tuple[Tensor, Tensor | None]) -> None:
        """Copy the weight back: W + D - D is not W in floating point."""
        weight, master = content
        write(model.weight(self.place), weight)
        model.masters.pop(self.place, None)
        if master is not None:
            model.masters[self.place] = master

    def state(self, model: EditableModel) -> dict[str, Tensor]:
        """The weight."""
        return {self.place: model.weight(self.place).detach()}

    def original(self, content: tuple[Tensor, Tensor | None]) -> dict[str, Tensor]:
        """The weight before any change."""
        return {self.place: content[0]}

    def tensors(self) -> dict[str, Tensor]:
        """Keys with their values, and factors."""
        further = {"left": self.update.left, "values": self.values, "gradients": self.update.gradients}
        known = {name: each for name, each in further.items() if each is not None}
        return {"keys": self.keys, "right": self.update.right, **known}

    @classmethod
    def from_tensors(cls, place: str, tensors: Mapping[str, Tensor]) -> WeightChange:
        """A change from keys and factors.

        Raises:
            ValueError: If they are not finite matrices that fit each other.
        """
        update = Update(tensors["right"], tensors.get("left"), gradients=tensors.get("gradients"))
        keys, values, gradients = tensors["keys"], tensors.get("values"), update.gradients
        parts = [each for each in (update.right, update.left, keys, values, gradients) if each is not None]
        if not all(each.dim() == 2 and each.is_floating_point() and torch.isfinite(each).all() for each in parts):
            raise ValueError(f"{place}: keys and factors are not finite matrices")
        fits = update.left is None or len(update.left) == len(update.right)
        fits &= values is None or values.shape == (len(keys), update.shape[0])
        fits &= gradients is None or (update.left is not None and gradients.shape == update.left.shape)
        if not fits or (len(keys) and keys.shape[1] != update.right.shape[1]):
            shapes = ", ".join(str(tuple(each.shape)) for each in parts)
            raise ValueError(f"{place}: keys and factors of shapes {shapes} do not fit each other")
        return cls(place, update, keys, values)

    def hash(self, model: EditableModel) -> str:
        """SHA-256 of the weight."""
        return tensor_hash(whole(model.weight(self.place).detach()))


class ModuleChange(Change):
    """A module put in the place of another, such as a side memory around a projection; no hooks are used.

    Subclasses are frozen dataclasses with the field ``place``; they define ``build``, ``tensors`` and ``from_tensors``.
    """

    @abstractmethod
    def build(self, module: nn.Module) -> nn.Module:
        """The module that takes the place of ``module``, which is what the place holds now."""

    @final
    def apply(self, model: EditableModel) -> None:
        """Put the new module into its place."""
        self.undo(model, self.build(model.module(self.place)))
        for name, parameter in model.module(self.place).named_parameters():
            if not torch.isfinite(parameter).all():
                raise NumericalError(f"{self.place}: {name} of the new module is not finite; train in smaller steps")

    @final
    def read(self, model: EditableModel) -> nn.Module:
        """The module itself."""
        return model.module(self.place)

    @final
    def undo(self, model: EditableModel, content: nn.Module) -> None:
        """Put the earlier module back."""
        model.put(self.place, content)

    @final
    def state(self, model: EditableModel) -> dict[str, Tensor]:
        """State dict of the module, under the names that it has in the model."""
        return model.module(self.place).state_dict(prefix=f"{self.place}.")

    @final
    def original(self, content: nn.Module) -> dict[str, Tensor]:
        """Nothing: the unedited model has the module."""
        return {}
