"""Allocators: the share of the remaining residual for each layer."""

from cakeflow.allocators.base import Allocator, LayerContext, ShareAllocator
from cakeflow.allocators.jacobian import Jacobian, conjugate_gradients
from cakeflow.allocators.sequential import Sequential, shares_from_fractions
from cakeflow.forward.jacobian import LinearMap

__all__ = [
    "Allocator", "Jacobian", "LayerContext", "LinearMap", "Sequential", "ShareAllocator", "conjugate_gradients",
    "shares_from_fractions",
]  # fmt: skip
