"""Allocators: which share of the remaining residual each layer takes."""

from cakeflow.allocators.base import Allocator, ShareAllocator, Turn
from cakeflow.allocators.jacobian import Jacobian
from cakeflow.allocators.sequential import Sequential, shares_from_fractions
from cakeflow.forward.jacobian import Chain

__all__ = ["Allocator", "Chain", "Jacobian", "Sequential", "ShareAllocator", "Turn", "shares_from_fractions"]
