"""Parts of methods for long streams of edits: solvers, terms of the target objective, and rules of the search."""

from cakeflow_streams.names import MinorSpace
from cakeflow_streams.search import NormFeedback, SolvedTimes
from cakeflow_streams.spaces import RenewedNullSpace, UnusedSpace
from cakeflow_streams.spectrum import SpectralGuard

__all__ = ["MinorSpace", "NormFeedback", "RenewedNullSpace", "SolvedTimes", "SpectralGuard", "UnusedSpace"]
