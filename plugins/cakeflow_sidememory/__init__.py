"""Memory beside the weights: trained shards of one projection, routed by distance."""

from cakeflow_sidememory.changes import ShardChange, ShardEnd
from cakeflow_sidememory.joins import join
from cakeflow_sidememory.learning import EditRows, Learned, LearningProblem, LearningRule, learn, original_weight
from cakeflow_sidememory.method import SideMemory
from cakeflow_sidememory.objective import Margin
from cakeflow_sidememory.shards import ShardedProjection, ShardSettings

__all__ = [
    "EditRows", "Learned", "LearningProblem", "LearningRule", "Margin", "ShardChange", "ShardEnd", "ShardSettings",
    "ShardedProjection", "SideMemory", "join", "learn", "original_weight",
]  # fmt: skip
