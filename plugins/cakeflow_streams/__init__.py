"""Parts of methods for long streams of edits: solvers, terms of the target objective, and rules of the search."""

from cakeflow_streams.blend import ResidualBlend
from cakeflow_streams.conflict import ConflictHistory
from cakeflow_streams.forgetting import Forgetting
from cakeflow_streams.importance import FisherPenalty
from cakeflow_streams.rank import RankSearch

__all__ = ["ConflictHistory", "FisherPenalty", "Forgetting", "RankSearch", "ResidualBlend"]
