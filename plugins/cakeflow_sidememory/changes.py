"""The module that holds a side memory, and the change that puts it in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cakeflow.journal import ModuleChange
from cakeflow.models import is_transposed


class RoutedProjection(nn.Module):
    """A projection with a side memory: inputs near a stored key get the memory's answer, all others the projection's.

    Every token is routed by its own input, so that an answer depends neither on padding nor on the other texts in a
    forward pass.

    Args:
        base: The projection, which stays as it is.
        weight: Weight of the memory, d_out x d_in whatever the layout of the projection.
        keys: One key per edited fact.
        radius: Distance from each key up to which the memory answers.
    """

    def __init__(
        self,
        base: nn.Module,
        weight: Float[Tensor, "d_out d_in"],
        keys: Float[Tensor, "n d_in"],
        radius: Float[Tensor, " n"],
    ) -> None:
        super().__init__()
        self.base = base
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.keys: Tensor
        self.radius: Tensor
        self.register_buffer("keys", keys)
        self.register_buffer("radius", radius)
        self.train(base.training)

    @classmethod
    def around(cls, module: nn.Module) -> RoutedProjection:
        """Return the module itself if it has a memory; else the module with a copy of its weight and no keys."""
        if isinstance(module, cls):
            return module
        weight = module.get_parameter("weight").detach()
        weight = (weight.T if is_transposed(module) else weight).clone()
        return cls(module, weight, weight.new_empty(0, weight.shape[1]), weight.new_empty(0))

    def forward(self, inputs: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens d_out"]:
        """Compute both answers and choose one of them for each token."""
        memory = nn.functional.linear(inputs, self.weight, self.base.bias)  # type: ignore[arg-type]
        return torch.where(self.routes(inputs)[..., None], memory, self.base(inputs))

    @torch.no_grad()
    def routes(self, inputs: Float[Tensor, "*tokens d_in"]) -> Tensor:
        """Return True for each token whose input lies within the radius of a key."""
        mode = "donot_use_mm_for_euclid_dist"  # the default subtracts squares, which rounds small distances to 0
        distance = torch.cdist(inputs.flatten(0, -2).float(), self.keys.float(), compute_mode=mode)
        return (distance <= self.radius.float()).any(-1).view(inputs.shape[:-1])


@dataclass(frozen=True, eq=False)
class SideMemoryChange(ModuleChange):
    """Facts that are added to the side memory of a projection; the first ones create it.

    Attributes:
        place: Name of the projection.
        update: Change of the memory's weight, which starts as a copy of the projection's.
        keys: One key per fact.
        radius: Distance from each key up to which the memory answers.
    """

    place: str
    update: Float[Tensor, "d_out d_in"]
    keys: Float[Tensor, "n d_in"]
    radius: Float[Tensor, " n"]

    def build(self, module: nn.Module) -> RoutedProjection:
        """Return a new memory, with the earlier facts if there is one; ``module`` stays as it is."""
        earlier = RoutedProjection.around(module)
        keys, radius = (each.to(earlier.weight) for each in (self.keys, self.radius))
        return RoutedProjection(
            earlier.base,
            earlier.weight.detach() + self.update.to(earlier.weight),
            torch.cat([earlier.keys, keys]),
            torch.cat([earlier.radius, radius]),
        )

    def preserved_keys(self) -> Float[Tensor, "n d_in"]:
        """Return the keys: later batches must not change the memory's answers there."""
        return self.keys

    def tensors(self) -> dict[str, Tensor]:
        """Update, keys and radius."""
        return {"update": self.update, "keys": self.keys, "radius": self.radius}

    @classmethod
    def from_tensors(cls, place: str, tensors: Mapping[str, Tensor]) -> SideMemoryChange:
        """Return the change with these tensors."""
        return cls(place, tensors["update"], tensors["keys"], tensors["radius"])
