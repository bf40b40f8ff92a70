"""A change of a module for tests: its output times a factor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from cakeflow.journal.changes import ModuleChange


class Scaling(nn.Module):
    """A module whose output is multiplied by a factor."""

    def __init__(self, inner: nn.Module, factor: torch.Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("factor", factor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.factor


@dataclass(frozen=True, eq=False)
class Scaled(ModuleChange):
    """Puts ``Scaling`` in the module's place."""

    place: str
    factor: torch.Tensor

    def build(self, module: nn.Module) -> nn.Module:
        return Scaling(module, self.factor)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"target": self.factor}  # a name that target values have, too

    @classmethod
    def from_tensors(cls, place: str, tensors: dict[str, torch.Tensor]) -> Scaled:
        return cls(place, tensors["target"])
