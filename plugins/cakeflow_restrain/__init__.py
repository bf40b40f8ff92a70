"""Solvers that restrain the change of another solver: RECT and PRUNE."""

from cakeflow_restrain.prune import Prune
from cakeflow_restrain.rect import Rect

__all__ = ["Prune", "Rect"]
