"""The common part of edit modules with a routed memory: questions, routed by it or by an oracle, and their routes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cakeflow.core import EditModule
from cakeflow.data import EditRequest
from cakeflow.errors import ConfigError
from cakeflow.evaluation import prompt_contexts, scored_prompts
from cakeflow.forward import TextBatch, encode_texts
from cakeflow.journal import Journal, request_hash
from cakeflow.models import LanguageModel, Site, forced_decisions
from cakeflow_sidememory.routes import GivesDistances, Route, own_answer, routes


def learned(journal: Journal) -> list[str]:
    """Return the SHA-256 of each fact of the batches in force, in the order of learning."""
    return [name for step in journal for name in step.hashes]


def require_block(lm: LanguageModel, layer: int) -> None:
    """Check that a model has a block; negative numbers count from the last.

    Raises:
        ConfigError: If it has not.
    """
    if not -lm.depth <= layer < lm.depth:
        raise ConfigError(
            f"layer {layer} is not in the model, which has blocks 0 to {lm.depth - 1}, or {-lm.depth} to -1 "
            "from its end"
        )


class MemoryEdit(EditModule[TextBatch]):
    """The base of edit modules that put a module in the place of one projection.

    Attributes:
        layer: Block of the projection; negative numbers count from the last.
        role: The projection, by its role or its path in the block.
    """

    layer: int
    role: str

    @property
    def site(self) -> Site:
        """The projection."""
        return Site(self.layer % self.lm.depth, self.role)

    def check_model(self) -> None:
        """Check that the model has the block.

        Raises:
            ConfigError: If it has not.
        """
        require_block(self.lm, self.layer)


class RoutedEdit(MemoryEdit):
    """The base of edit modules whose memory routes questions by distance.

    Attributes:
        oracle: Whether evaluations send a question of a fact in force, its prompt or a paraphrase, to that fact's own
            answer, and every other question to the unedited projection. Nobody knows that of a question in use: it
            measures what a memory holds apart from how it is found, and nothing else is routed so, neither free
            answers of callbacks nor ``Editor.ask``, nor another memory of the model.
            Where two questions have one prompt, the edited one counts, and of two facts the later one.
    """

    oracle: bool = False

    @property
    def protocol(self) -> str:
        """The evaluation's name; with an oracle it says so."""
        return super().protocol + ("+oracle" if self.oracle else "")

    def ask(self, requests: Sequence[EditRequest]) -> Any:
        """Ask the model about the next requests of an evaluation."""
        module = self.lm.module(self.site)
        if not self.oracle or not isinstance(module, GivesDistances):
            return super().ask(requests)
        with forced_decisions(module, self._own_answers(requests, module)):
            return super().ask(requests)

    def routes(self, requests: Sequence[EditRequest]) -> list[Route]:
        """Return the routes of all prompts of some requests, as the memory itself decides; no other memory's."""
        return routes(self.lm, requests, learned(self.journal), self.lm.architecture.path(self.site))

    def _own_answers(self, requests: Sequence[EditRequest], module: GivesDistances) -> dict[tuple[int, ...], int]:
        """Return the decisions of the oracle, by the tokens of the prompts."""
        facts = {name: place for place, name in enumerate(learned(self.journal))}
        hashes = [request_hash(request) for request in requests]
        ranked = [
            (facts.get(hashes[each.record], -1) if answer else -1, each.prompt, answer)
            for each in scored_prompts(requests)
            for answer in [own_answer(each, hashes, facts, module) or 0]
        ]
        own = {prompt: (rank, answer) for rank, prompt, answer in sorted(ranked)}
        asked = [*own, *(map(self.lm.user_turn, own) if self.evaluation.chat else ())]
        contexts = zip([*own, *own], encode_texts(self.lm.tokenizer, asked), strict=False)
        scored = prompt_contexts(self.lm, requests, self.evaluation.protocol)
        ordered = sorted([*scored, *contexts], key=lambda pair: own[pair[0]])
        return {context: own[prompt][1] for prompt, context in ordered}
