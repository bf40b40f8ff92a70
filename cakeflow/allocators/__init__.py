"""Allocators: which share of the remaining residual each layer takes."""

from cakeflow.allocators.base import Allocator, LayerContext, ShareAllocator
from cakeflow.allocators.jacobian import Jacobian
from cakeflow.allocators.sequential import Sequential, shares_from_fractions
from cakeflow.forward.jacobian import LinearMap

__all__ = [
    "Allocator",
    "Jacobian",
    "LayerContext",
    "LinearMap",
    "Sequential",
    "ShareAllocator",
    "shares_from_fractions",
]
