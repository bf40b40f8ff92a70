"""Memory beside the weights: shards, a codebook, or small edits that are composed; and controls to beat."""

from cakeflow_sidememory.changes import FactorChange, ShardChange, ShardEnd
from cakeflow_sidememory.codebook import Balls, Codebook, CodebookSettings, fold
from cakeflow_sidememory.codebook_edit import CodebookChange, CodebookMemory
from cakeflow_sidememory.composed import ComposedProjection, ComposedSettings
from cakeflow_sidememory.composition import Retrieval
from cakeflow_sidememory.factor_memory import FactorMemory
from cakeflow_sidememory.factors import FactorTraining
from cakeflow_sidememory.joins import join
from cakeflow_sidememory.learning import (
    EditRows,
    Learned,
    LearningProblem,
    LearningRule,
    Rehearsal,
    learn,
    original_weight,
)
from cakeflow_sidememory.method import SideMemory
from cakeflow_sidememory.objective import Margin
from cakeflow_sidememory.retrieval import FactsInContext, Match, Retriever, TfidfRetriever
from cakeflow_sidememory.routes import Measured, Route, routes
from cakeflow_sidememory.routing_metrics import OwnAnswers, RouteCheck, RoutingAccuracy, RoutingAUC, routing_numbers
from cakeflow_sidememory.shards import ShardedProjection, ShardSettings
from cakeflow_sidememory.values import Entry, ValueTraining, learn_entry

__all__ = [
    "Balls", "Codebook", "CodebookChange", "CodebookMemory", "CodebookSettings", "ComposedProjection",
    "ComposedSettings", "EditRows", "Entry", "FactorChange", "FactorMemory", "FactorTraining", "FactsInContext",
    "Learned", "LearningProblem", "LearningRule", "Margin", "Match", "Measured", "OwnAnswers", "Rehearsal",
    "Retrieval", "Retriever", "Route", "RouteCheck", "RoutingAUC", "RoutingAccuracy", "ShardChange", "ShardEnd",
    "ShardSettings", "ShardedProjection", "SideMemory", "TfidfRetriever", "ValueTraining", "fold", "join", "learn",
    "learn_entry", "original_weight", "routes", "routing_numbers",
]  # fmt: skip
