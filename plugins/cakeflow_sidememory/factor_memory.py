"""The edit method: factors of each fact beside one projection, composed by the question."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, final

import torch
from torchmetrics import Metric

from cakeflow.data import Contexts, EditRequest
from cakeflow.errors import ConfigError
from cakeflow.evaluation import Evaluation
from cakeflow.forward import TextBatch, encode_batch
from cakeflow.journal import EditStep
from cakeflow.models import LanguageModel, Site
from cakeflow_sidememory.changes import FactorChange
from cakeflow_sidememory.composed import ComposedProjection, ComposedSettings
from cakeflow_sidememory.composition import Retrieval, Rule, read_representations
from cakeflow_sidememory.factors import FactorTraining, TrainedFactors, initial_directions, train_factors
from cakeflow_sidememory.neurons import require_neurons, require_share
from cakeflow_sidememory.questions import MemoryEdit


@final
class FactorMemory(MemoryEdit):
    """Keeps each fact as a small change of one projection's output; those that a question needs answer it together.

    A3E (NeurIPS 2025): several edits may be answers of one question, where edits of weights would contradict each
    other. Each fact's factors are trained on the unedited model, so that neither their order nor other facts matter,
    and any batch can be taken back exactly. The model's weights stay. A fact that is edited again acts once, with its
    last factors. Several answers of one question need a relation each (``EditRequest.relation``), since without one
    they count as a contradiction (``tasks.Question.requests``).

    Args:
        base: Name or folder of a model, or a ``LanguageModel``.
        layer: Block of the projection; negative numbers count from the last, which is the official one.
        role: The projection that writes the block's neurons, by its path in the block: ``mlp.up_proj`` where the MLP
            is gated, ``mlp.c_fc`` in GPT-2.
        similarity_layer: An earlier block. The output of its down projection, in the same pass, tells which subjects
            a question names; officially 5 of 32.
        training: How the factors of a fact are trained.
        retrieval: Which facts a question retrieves; of fewer than ``top`` facts, all that are near enough.
        rule: How their changes are joined.
        evaluation: What the model is asked.
        metrics: Further metrics of every evaluation.
        record_texts: Whether the ledger has the texts of the requests.
        private: Whether only their owner can read the run folders that are made.

    Raises:
        ConfigError: If ``rule`` names no rule, or the model has no such block.
    """

    def __init__(
        self,
        base: str | LanguageModel = "smollm2-135m",
        layer: int = -1,
        role: str = "mlp.up_proj",
        similarity_layer: int = 5,
        training: FactorTraining = FactorTraining(),
        retrieval: Retrieval = Retrieval(),
        rule: Rule = "agreeing",
        evaluation: Evaluation = Evaluation(),
        metrics: Sequence[Metric] = (),
        record_texts: bool = True,
        private: bool = True,
    ) -> None:
        ComposedSettings("", retrieval, rule)
        self.layer, self.role, self.similarity_layer = layer, role, similarity_layer
        self.training_rule, self.retrieval, self.rule = training, retrieval, rule
        super().__init__(base, evaluation, metrics, {}, record_texts=record_texts, private=private)
        if isinstance(base, LanguageModel):
            self.check_model()

    def settings(self) -> dict[str, Any]:
        """Return all arguments that decide the outcome."""
        plain = {name: getattr(self, name) for name in ("layer", "role", "similarity_layer", "rule")}
        parts = {"training": asdict(self.training_rule), "retrieval": asdict(self.retrieval)}
        return {**plain, **parts, "evaluation": repr(self.evaluation)}

    @property
    def place(self) -> str:
        """Path of the projection."""
        return self.lm.architecture.path(self.site)

    def encode(self, requests: Sequence[EditRequest]) -> TextBatch:
        """Tokenize all prompts with their targets; no contexts, as they add nothing to the training."""
        return encode_batch(self.lm, requests, Contexts())

    def prepare(self, batches: Sequence[TextBatch]) -> None:
        """Check that the model has both projections, in this order, and enough neurons; nothing is measured.

        Raises:
            ArchitectureError: If a projection is not there, or does not write the neurons of its block.
            ConfigError: If the block of the similarity does not come earlier, or ``share`` is less than a neuron.
        """
        with self._alone():
            require_neurons(self.lm, self.site)
            require_share(len(self.lm.oriented(self.site)), self.training_rule.share)
        if not 0 <= self.similarity_layer < self.site.layer:
            raise ConfigError(
                f"similarity_layer={self.similarity_layer} must be a block before that of the projection, "
                f"{self.site.layer}: a question is compared before it is answered"
            )
        self.lm.module(Site(self.similarity_layer, "mlp_out"))

    def edit(self, batch: TextBatch, step: EditStep) -> None:
        """Train the factors of a batch, each fact by itself, and put them in place."""
        rows = [variants[0] for variants in batch.rows]
        facts = [fact_number(request) for request in batch.requests]
        with self.phase("memory"), self._alone():
            training, width = self.training_rule, self.lm.key_width(self.site)
            start = initial_directions(facts, width, training.blocks, training.seed)
            trained = train_factors(self.lm, rows, self.site, training, start)
            near = self.similarity_layer
            states = getattr(read_representations(self.lm, rows, near, near), self.retrieval.part)
            states = states.to(torch.promote_types(states.dtype, torch.float32))
        settings = ComposedSettings(
            self.lm.architecture.path(Site(self.similarity_layer, "mlp_out")), self.retrieval, self.rule
        )
        questions = torch.tensor([question_number(request) for request in batch.requests])
        change = FactorChange(self.place, settings, trained.factors, states, questions)
        numbers = _summary(trained)
        self.journal.apply(step, change, numbers)
        for name, value in numbers.items():
            self.log(f"memory/{name}", value, batch_size=len(batch))

    def memory(self) -> ComposedProjection:
        """Return the module with all edits.

        Raises:
            ConfigError: If nothing was edited.
        """
        module = self.lm.module(self.place)
        if not isinstance(module, ComposedProjection):
            raise ConfigError(f"{self.place} has no edits beside it; edit some facts first")
        return module

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Have the projection without its edits: they are trained on the unedited model."""
        module = self.lm.module(self.place)
        if not isinstance(module, ComposedProjection):
            yield
            return
        self.lm.put(self.place, module.base)
        try:
            yield
        finally:
            self.lm.put(self.place, module)


def fact_number(request: EditRequest) -> int:
    """Return the number of a fact, below 2^63: its prompt, subject and target say which it is, and nothing else."""
    return _number(request.prompt, request.subject, request.target_new)


def question_number(request: EditRequest) -> int:
    """Return the number of what a fact answers, its prompt and relation: a later fact with it takes its place."""
    return _number(request.text, request.relation)


def _number(*words: str | None) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(words).encode()).digest()[:8], "big") >> 1


def _summary(trained: TrainedFactors) -> dict[str, float]:
    """Return the means over facts of their losses before the last step."""
    return {name: float(values[:, -1].mean()) for name, values in trained.losses._asdict().items()}
