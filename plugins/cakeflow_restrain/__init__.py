"""Solvers that hold another solver's change back: RECT and PRUNE, over any solver."""

from cakeflow_restrain.prune import Prune
from cakeflow_restrain.rect import Rect

__all__ = ["Prune", "Rect"]
