"""Weighters: the importance of each candidate layer. A weight of 0 excludes the layer from the edit."""

from cakeflow.weighters.base import Weighter, effective_layers
from cakeflow.weighters.scores import Scores
from cakeflow.weighters.static import Endpoints, OneHot, Uniform

__all__ = ["Endpoints", "OneHot", "Scores", "Uniform", "Weighter", "effective_layers"]
