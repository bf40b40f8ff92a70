"""Allocators: which share of the remaining residual each layer takes."""

from cakeflow.allocators.base import Allocator, Chain, ShareAllocator, Turn
from cakeflow.allocators.jacobian import Jacobian
from cakeflow.allocators.sequential import Sequential, shares_from_fractions

__all__ = ["Allocator", "Chain", "Jacobian", "Sequential", "ShareAllocator", "Turn", "shares_from_fractions"]
