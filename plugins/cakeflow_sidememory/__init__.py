"""Edits beside the weights: a trained copy of one projection that answers only near the keys of edited facts."""

from cakeflow_sidememory.changes import RoutedProjection, SideMemoryChange
from cakeflow_sidememory.method import SideMemory

__all__ = ["RoutedProjection", "SideMemory", "SideMemoryChange"]
