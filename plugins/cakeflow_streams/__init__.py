"""Parts of methods for long streams of edits: solvers, terms of the target objective, and rules of the search."""

from cakeflow_streams.forgetting import Forgetting
from cakeflow_streams.importance import FisherPenalty

__all__ = ["FisherPenalty", "Forgetting"]
