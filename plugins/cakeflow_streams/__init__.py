"""Parts of methods for long streams of edits: solvers, terms of the target objective, and rules of the search."""

from cakeflow_streams.blend import ResidualBlend
from cakeflow_streams.conflict import ConflictHistory
from cakeflow_streams.forgetting import Forgetting
from cakeflow_streams.gradient import NormalizedGradient
from cakeflow_streams.importance import FisherPenalty
from cakeflow_streams.names import MinorSpace
from cakeflow_streams.preservation import PreservationQueue
from cakeflow_streams.rank import RankSearch
from cakeflow_streams.search import NormFeedback, SolvedTimes, typical_norm
from cakeflow_streams.spaces import RenewedNullSpace, UnusedSpace
from cakeflow_streams.spectrum import SpectralGuard
from cakeflow_streams.swap import SwapSearch

__all__ = [
    "ConflictHistory", "FisherPenalty", "Forgetting", "MinorSpace", "NormFeedback", "NormalizedGradient",
    "PreservationQueue", "RankSearch", "RenewedNullSpace", "ResidualBlend", "SolvedTimes", "SpectralGuard",
    "SwapSearch", "UnusedSpace", "typical_norm",
]  # fmt: skip
