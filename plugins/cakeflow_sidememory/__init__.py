"""Memory beside the weights: trained shards of one projection, routed by distance, or small edits that are composed."""

from cakeflow_sidememory.changes import FactorChange, ShardChange, ShardEnd
from cakeflow_sidememory.composed import ComposedProjection, ComposedSettings
from cakeflow_sidememory.composition import Retrieval
from cakeflow_sidememory.factor_memory import FactorMemory
from cakeflow_sidememory.factors import FactorTraining
from cakeflow_sidememory.joins import join
from cakeflow_sidememory.learning import EditRows, Learned, LearningProblem, LearningRule, learn, original_weight
from cakeflow_sidememory.method import SideMemory
from cakeflow_sidememory.objective import Margin
from cakeflow_sidememory.shards import ShardedProjection, ShardSettings

__all__ = [
    "ComposedProjection", "ComposedSettings", "EditRows", "FactorChange", "FactorMemory", "FactorTraining", "Learned",
    "LearningProblem", "LearningRule", "Margin", "Retrieval", "ShardChange", "ShardEnd", "ShardSettings",
    "ShardedProjection", "SideMemory", "join", "learn", "original_weight",
]  # fmt: skip
