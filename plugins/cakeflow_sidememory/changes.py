"""The changes of side memories: facts that a shard learned, a shard that is put away, and factors of edits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from cakeflow.errors import LedgerError, ShapeError
from cakeflow.journal import ModuleChange
from cakeflow_sidememory.composed import ComposedProjection, ComposedSettings
from cakeflow_sidememory.factors import Factors
from cakeflow_sidememory.shards import ShardedProjection, ShardSettings, plain_weight
from cakeflow_sidememory.stored import REMEDY, counts, decoded, encoded, numbers


def packed(mask: Bool[Tensor, "d_out d_in"]) -> UInt8[Tensor, " bytes"]:
    """Return a mask as bits."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def unpacked(bits: UInt8[Tensor, " bytes"], shape: torch.Size) -> Bool[Tensor, "d_out d_in"]:
    """Return the mask of this shape that ``packed`` wrote.

    Raises:
        ValueError: If it is of another shape.
    """
    if len(bits) != -(-shape.numel() // 8):
        raise ValueError(f"{len(bits)} bytes are no mask of shape {tuple(shape)}")
    flat = np.unpackbits(bits.cpu().numpy(), count=shape.numel())
    return torch.from_numpy(flat).bool().view(shape)


@dataclass(frozen=True, eq=False)
class ShardChange(ModuleChange):
    """Facts that the shard being written learned; the first ones put the side memory in place.

    Attributes:
        place: Name of the projection.
        settings: Rules of the side memory.
        values: Entries of the shard under its mask, or all of them.
        bits: The mask; empty if all entries changed.
        least: The shard's threshold.
        edits: Number of facts.
    """

    place: str
    settings: ShardSettings
    values: Float[Tensor, " entries"]
    bits: UInt8[Tensor, " bytes"]
    least: float
    edits: int
    stands_alone = False

    @classmethod
    def of(
        cls, place: str, memory: ShardedProjection, weight: Tensor, mask: Tensor | None, least: float, edits: int
    ) -> ShardChange:
        """Return the change that gives a side memory's open shard this weight."""
        bits = packed(mask) if mask is not None else torch.empty(0, dtype=torch.uint8)
        values = weight[mask] if mask is not None else weight.flatten()
        return cls(place, memory.settings, values.cpu(), bits, least, edits)

    def build(self, module: nn.Module) -> ShardedProjection:
        """Return a new side memory; ``module`` stays as it is.

        Raises:
            ShapeError: If the shard is none of this projection's.
        """
        memory = ShardedProjection.around(module, self.settings)
        weight = plain_weight(memory.base)
        self._require_fit(weight.shape)
        if len(self.bits):
            weight[unpacked(self.bits, weight.shape).to(weight.device)] = self.values.to(weight)
        else:
            weight = self.values.to(weight).view(weight.shape)
        shards, least = [weight, *memory.shards[1:]], [self.least, *memory.least.tolist()[1:]]
        return memory.changed(shards, least, int(memory.edits) + self.edits)

    def _require_fit(self, shape: torch.Size) -> None:
        entries = int(np.unpackbits(self.bits.cpu().numpy()).sum()) if len(self.bits) else shape.numel()
        if len(self.values) != entries or len(self.bits) not in (0, -(-shape.numel() // 8)):
            raise ShapeError(
                f"{self.place} is {tuple(shape)}, and the shard has {len(self.values)} entries and a mask of "
                f"{len(self.bits)} bytes; a memory belongs to the model that it was made for"
            )

    def tensors(self) -> dict[str, Tensor]:
        """Values, mask, threshold, number of facts and settings."""
        numbers = {"least": torch.tensor([self.least], dtype=torch.float64), "edits": torch.tensor([self.edits])}
        return {"values": self.values, "bits": self.bits, "settings": encoded(self.settings), **numbers}

    @classmethod
    def from_tensors(cls, place: str, tensors: Mapping[str, Tensor]) -> ShardChange:
        """Return the change with these tensors.

        Raises:
            LedgerError: If the threshold is missing or no number, so that nothing could be routed by it, or the others
                are not of the kind, or not finite.
        """
        settings = decoded(tensors["settings"], ShardSettings)
        (values,), (bits, edits) = numbers(place, tensors, values=1), counts(place, tensors, bits=1, edits=1)
        least = float(tensors["least"][0]) if tensors["least"].numel() else float("nan")
        if math.isnan(least):
            raise LedgerError(f"the shard at {place} has no threshold, but {tensors['least'].tolist()}; {REMEDY}")
        if edits.numel() != 1 or int(edits[0]) < 0 or bits.dtype != torch.uint8:
            raise LedgerError(f"the shard at {place} has {edits.tolist()} facts and a mask of {bits.dtype}; {REMEDY}")
        return cls(place, settings, values, bits, least, int(edits[0]))


@dataclass(frozen=True, eq=False)
class ShardEnd(ModuleChange):
    """The shard being written is put away, joined with others where that is due, and a new one begins.

    Attributes:
        place: Name of the projection.
        settings: Rules of the side memory.
    """

    place: str
    settings: ShardSettings
    stands_alone = False

    def build(self, module: nn.Module) -> ShardedProjection:
        """Return a new side memory; ``module`` stays as it is."""
        return ShardedProjection.around(module, self.settings).put_away()

    def tensors(self) -> dict[str, Tensor]:
        """The settings."""
        return {"settings": encoded(self.settings)}

    @classmethod
    def from_tensors(cls, place: str, tensors: Mapping[str, Tensor]) -> ShardEnd:
        """Return the change with these tensors."""
        return cls(place, decoded(tensors["settings"], ShardSettings))


@dataclass(frozen=True, eq=False)
class FactorChange(ModuleChange):
    """Factors of edits beside a projection; the first ones put the module that composes them in place.

    Edits do not see each other, so the change stands alone: any of several can be taken back, exactly.

    Attributes:
        place: Name of the projection.
        settings: How edits are retrieved and composed.
        factors: The factors.
        states: The representation of each edit by which it is retrieved.
        facts: Number of each edit's fact.
    """

    place: str
    settings: ComposedSettings
    factors: Factors
    states: Float[Tensor, "n width"]
    facts: Int[Tensor, " n"]

    def build(self, module: nn.Module) -> ComposedProjection:
        """Return a new module; ``module`` stays as it is."""
        return ComposedProjection.around(module, self.settings, self.factors, self.states, self.facts)

    def tensors(self) -> dict[str, Tensor]:
        """Factors, representations, facts and settings."""
        parts = {"direction": self.factors.direction, "output": self.factors.output, "neurons": self.factors.neurons}
        scale = torch.tensor([self.factors.scale], dtype=torch.float64)
        own = {"states": self.states, "facts": self.facts, "scale": scale, "settings": encoded(self.settings)}
        return {name: each.cpu() for name, each in {**parts, **own}.items()}

    @classmethod
    def from_tensors(cls, place: str, tensors: Mapping[str, Tensor]) -> FactorChange:
        """Return the change with these tensors.

        Raises:
            LedgerError: If they are not of the kind, or not finite.
        """
        direction, output, states, scale = numbers(place, tensors, direction=2, output=2, states=2, scale=1)
        neurons, facts = counts(place, tensors, neurons=2, facts=1)
        if scale.numel() != 1 or neurons.dtype != torch.bool or neurons.shape != output.shape:
            raise LedgerError(f"the factors at {place} have no scale, or neurons of another shape; {REMEDY}")
        factors = Factors(direction, output, neurons, float(scale[0]))
        return cls(place, decoded(tensors["settings"], ComposedSettings), factors, states, facts)
