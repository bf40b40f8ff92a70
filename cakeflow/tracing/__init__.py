"""Locating facts: causal traces of what a model knows."""

from cakeflow.tracing.facts import Fact, known_rows, read_facts
from cakeflow.tracing.result import PLACES, Trace
from cakeflow.tracing.trace import CausalTrace

__all__ = ["PLACES", "CausalTrace", "Fact", "Trace", "known_rows", "read_facts"]
