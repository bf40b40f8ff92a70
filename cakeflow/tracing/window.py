"""Proposal of layers to edit, from traces of the model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from cakeflow.errors import ConfigError, RequestError
from cakeflow.forward.tokens import Row
from cakeflow.models.language import LanguageModel
from cakeflow.tracing.attribution import Attribution
from cakeflow.tracing.facts import Fact, known_rows, read_facts
from cakeflow.tracing.result import Trace
from cakeflow.tracing.trace import CausalTrace

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Proposal:
    """A window of layers to edit.

    Attributes:
        layers: The window, ascending.
        recovered: Gain in probability when the window's MLP outputs are restored together (its AIE).
        error: Standard error of the gain over the facts.
        runner_up: First layer of the next best window, and its gain.
        trace: The trace behind the proposal; ``trace.scores`` has every window by its middle layer.
        scores: Layer -> causal score of each layer of the window alone; empty if there is no such trace.
    """

    layers: list[int]
    recovered: float
    error: float
    runner_up: tuple[int, float]
    trace: Trace
    scores: dict[int, float] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        """One sentence on the evidence."""
        first, gain = self.runner_up
        return (
            f"restoring the MLP outputs of layers {self.layers[0]} to {self.layers[-1]} together recovers "
            f"{self.recovered:.3f} +- {self.error:.3f} of probability over {len(self.trace.effects)} known facts, more "
            f"than any other {len(self.layers)} adjacent layers (next: from layer {first}, {gain:.3f})"
        )


def propose_layers(trace: Trace, depth: int) -> Proposal:
    """Select the window of adjacent layers whose MLP outputs, restored at the subject's last token, recover most.

    An edit writes into these outputs at this token, so the trace measures where the right values help. Windows clipped
    by the model's ends are excluded, and so are those with the first block, unless there is no other: a trace puts its
    noise on the embeddings, and the first MLP, whose input is little more than its own token, removes the noise
    whatever the fact (on SmolLM2-135M it alone recovers more than any window of five without it).

    Args:
        trace: A trace with ``role="mlp_out"``, all layers, and ``window`` = number of layers to edit.
        depth: Number of blocks of the model.

    Raises:
        ConfigError: If the trace is of another kind.
    """
    width = int(trace.settings["window"])
    if trace.settings["role"] != "mlp_out" or trace.layers != list(range(depth)):
        raise ConfigError("layers are proposed from a trace of role 'mlp_out' over all layers; trace those")
    if width > depth:
        raise ConfigError(f"a window of {width} layers does not fit into {depth} blocks")
    whole = range(min(1, depth - width) + width // 2, depth - (width - 1) // 2)
    ranked = sorted(whole, key=lambda middle: -trace.scores[middle])
    best, second = ranked[0], ranked[min(1, len(ranked) - 1)]
    layers = list(range(best - width // 2, best - width // 2 + width))
    runner_up = second - width // 2, trace.scores[second]
    return Proposal(layers, trace.scores[best], trace.errors[best], runner_up, trace)


def locate(
    lm: LanguageModel,
    width: int = 5,
    facts: Sequence[Fact] = (),
    limit: int = 60,
    max_bytes: float | None = None,
) -> Proposal:
    """Trace a model and propose the layers to edit; for a model that was traced before, the result is cached.

    Args:
        lm: The model, not edited.
        width: Number of layers to edit.
        facts: Candidate facts, by default the built-in ones; those that the model does not state are skipped.
        limit: Most facts to trace.
        max_bytes: Most bytes beyond the model.

    Raises:
        ConfigError: If the model knows none of the facts, or one does not fit ``max_bytes``.
    """
    rows = _rows(lm, facts, limit, max_bytes)
    proposal = propose_layers(CausalTrace(role="mlp_out", window=width, max_bytes=max_bytes).run(lm, rows), lm.depth)
    log.info("layers %s: %s", proposal.layers, proposal.reason)
    return replace(proposal, scores=CausalTrace(max_bytes=max_bytes).run(lm, rows, proposal.layers).scores)


def known_scores(
    lm: LanguageModel,
    attribution: Attribution,
    layers: Sequence[int],
    facts: Sequence[Fact] = (),
    limit: int = 60,
    max_bytes: float | None = None,
) -> dict[int, float]:
    """Compute layer -> score, the mean over facts that the model knows.

    Args:
        lm: The model, not edited.
        attribution: Measure of the scores.
        layers: Layers to score.
        facts: Candidate facts, by default the built-in ones.
        limit: Most facts to score.
        max_bytes: Most bytes beyond the model.

    Raises:
        ConfigError: If the model knows none of the facts, or one does not fit ``max_bytes``.
    """
    rows = _rows(lm, facts, limit, max_bytes)
    scores = attribution.within(max_bytes).attribute(lm, rows, layers).mean(0)
    return dict(zip(layers, scores.tolist(), strict=True))


def _rows(lm: LanguageModel, facts: Sequence[Fact], limit: int, max_bytes: float | None) -> list[Row]:
    facts = facts or read_facts("builtin")
    try:
        rows, tried = known_rows(lm, facts, limit, max_bytes=max_bytes)
    except RequestError as error:
        raise ConfigError(
            f"layers and scores cannot be measured: the model knows none of the facts of the trace ({len(facts)}, the "
            f"first is {facts[0].text!r}); name layers=[...] and scores={{layer: score, ...}}, or take scores from a "
            "trace of facts that it states ('cakeflow facts', then 'cakeflow trace --data')"
        ) from error
    log.info("the model knows %d of %d facts", len(rows), tried)
    return rows
