"""Location of facts: causal traces of what a model knows."""

from cakeflow.tracing.attribution import Attribution
from cakeflow.tracing.facts import Fact, KnownFact, known_facts, known_rows, open_facts, predicted_rows, read_facts
from cakeflow.tracing.result import LAST_SUBJECT, PLACES, Trace, place_of
from cakeflow.tracing.trace import CausalTrace, noise_of
from cakeflow.tracing.window import Proposal, known_scores, locate, propose_layers

__all__ = [
    "LAST_SUBJECT", "PLACES", "Attribution", "CausalTrace", "Fact", "KnownFact", "Proposal", "Trace", "known_facts",
    "known_rows", "known_scores", "locate", "noise_of", "open_facts", "place_of", "predicted_rows", "propose_layers",
    "read_facts",
]  # fmt: skip
