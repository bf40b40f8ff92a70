"""Callbacks for any Lightning Trainer: measurements along a stream of edits, and a policy."""

from cakeflow.callbacks.consequences import ConsequenceCheck
from cakeflow.callbacks.context import ContextCheck
from cakeflow.callbacks.health import StreamHealth
from cakeflow.callbacks.key_drift import KeyDrift
from cakeflow.callbacks.knowledge import KnowledgeCheck
from cakeflow.callbacks.neighbor_shift import NeighborShift
from cakeflow.callbacks.neutral_text import NeutralText
from cakeflow.callbacks.outcome import OutcomeCheck
from cakeflow.callbacks.periodic import PeriodicCallback
from cakeflow.callbacks.policy import PolicyGuard
from cakeflow.callbacks.retention import Retention
from cakeflow.journal.policy import Policy

__all__ = [
    "ConsequenceCheck", "ContextCheck", "KeyDrift", "KnowledgeCheck", "NeighborShift", "NeutralText", "OutcomeCheck",
    "PeriodicCallback", "Policy", "PolicyGuard", "Retention", "StreamHealth",
]  # fmt: skip
