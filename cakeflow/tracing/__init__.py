"""Locating facts: causal traces of what a model knows."""

from cakeflow.tracing.attribution import Attribution
from cakeflow.tracing.facts import Fact, known_rows, read_facts
from cakeflow.tracing.result import PLACES, Trace
from cakeflow.tracing.trace import CausalTrace
from cakeflow.tracing.window import Proposal, known_scores, locate, propose_layers

__all__ = [
    "PLACES",
    "Attribution",
    "CausalTrace",
    "Fact",
    "Proposal",
    "Trace",
    "known_rows",
    "known_scores",
    "locate",
    "propose_layers",
    "read_facts",
]
