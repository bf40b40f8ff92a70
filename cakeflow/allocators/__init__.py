"""Allocators: which share of the remaining residual each layer takes."""

from cakeflow.allocators.base import Allocator, ShareAllocator, Turn
from cakeflow.allocators.sequential import Sequential, shares_from_fractions

__all__ = ["Allocator", "Sequential", "ShareAllocator", "Turn", "shares_from_fractions"]
