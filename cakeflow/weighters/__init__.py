"""Weighters: how much each candidate layer matters. A weight of 0 leaves the layer out of the edit."""

from cakeflow.weighters.base import Weighter
from cakeflow.weighters.scores import Scores
from cakeflow.weighters.static import Endpoints, OneHot, Uniform

__all__ = ["Endpoints", "OneHot", "Scores", "Uniform", "Weighter"]
