"""The walk of one edit, readable top to bottom: locate, weight, assign, edit."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric
from tqdm.auto import tqdm

from cakeflow.allocators import Allocator, LayerContext, Sequential, ShareAllocator
from cakeflow.core.callback import LayerEdit
from cakeflow.core.contracts import checked_facts, checked_residual, checked_weights, naming, solved
from cakeflow.core.datamodule import Records
from cakeflow.core.memory import Footprint
from cakeflow.core.module import EditModule
from cakeflow.core.restore_state import RestoreState
from cakeflow.core.statistics import Statistics
from cakeflow.data.contexts import Contexts
from cakeflow.data.request import EditRequest
from cakeflow.errors import ConfigError
from cakeflow.evaluation.evaluation import Evaluation
from cakeflow.forward.generation import generate_contexts
from cakeflow.forward.jacobian import ModelJacobian
from cakeflow.forward.keys import FactReader
from cakeflow.forward.loss import WeightLoss
from cakeflow.forward.packing import GIB
from cakeflow.forward.tokens import EditBatch, encode_batch
from cakeflow.journal.journal import Journal
from cakeflow.journal.steps import EditStep, request_hash
from cakeflow.journal.store import JournalStore, run_folder
from cakeflow.models.architecture import Architecture, Site
from cakeflow.models.language import LanguageModel
from cakeflow.models.loading import load_model
from cakeflow.solvers import LeastSquares, Solver
from cakeflow.solvers.covariance import Covariance
from cakeflow.solvers.history import KeyHistory
from cakeflow.solvers.problem import LayerProblem
from cakeflow.targets.gradient import GradientSearch, Targets
from cakeflow.tracing import locate
from cakeflow.weighters import Uniform, Weighter
from cakeflow.weighters.base import effective_layers

SETTINGS = (
    "layers", "seed", "use_history", "weighter", "allocator", "solver", "targets", "statistics", "contexts",
    "evaluation",
)  # fmt: skip
"""Attributes of a module that decide the outcome of its edits, beside the model."""


class LocateThenEdit(EditModule):
    """Edits a language model; one training step is one batch of edits.

    Args:
        base: A model's embedded name, hub id, folder or GGUF file, or a ``LanguageModel``. Names load on first use.
        layers: Candidate layers, ascending; the weighter says which of them are edited. ``auto`` traces the model
            before the first edit and takes the window of five that ``locate`` proposes.
        weighter: How much each layer matters.
        allocator: Which share of the remaining residual each layer takes.
        solver: The closed-form weight change.
        targets: How target values are found.
        statistics: How the second moments of the keys to preserve are collected.
        contexts: Texts around each prompt; None samples them from the model before the first edit.
        scores: Causal score of each layer of this model, for a ``Scores`` weighter that was given none; with
            ``layers="auto"`` the trace's take their place.
        history: Whether earlier edits' keys are preserved as well (sequential editing).
        seed: Of the sampled contexts.
        dtype: Of the weights when ``base`` is a name, as in ``AutoModelForCausalLM.from_pretrained``.
        model_kwargs: Further arguments of that function: ``device_map``, ``max_memory``, ``attn_implementation`` ...
        architecture: Module paths, where they cannot be found from the model.
        moments: Second moments that are known already, layer -> C; replaces ``statistics``.
        evaluation: What is asked of the model when it is evaluated.
        metrics: Further metrics of every evaluation, fed by the names of their arguments with what ``PromptScores``
            has, ``texts`` and ``references``; logged by class name in lower case.
        memory_budget: Most memory in GiB that edits may take beyond the model: target values are looked for in parts
            that fit, second moments in several passes, and a batch that fits in no way is refused. None keeps to 8 GiB
            where there is a choice, and refuses nothing.
        record_texts: Whether the run folder's ledger has the texts of the requests; it always has their hashes.
        max_relative_update: Largest update of a layer by one batch, in norms of its weight; a larger one has run away,
            and the batch is taken back. On SmolLM2, eight facts by six shipped recipes stay below 0.2.

    Raises:
        ConfigError: If the layers are not ascending or not in the model, or a limit is not above 0.
    """

    def __init__(
        self,
        base: str | LanguageModel = "smollm2-135m",
        layers: Sequence[int] | Literal["auto"] = (),
        weighter: Weighter = Uniform(),
        allocator: Allocator = Sequential(),
        solver: Solver = LeastSquares(),
        targets: GradientSearch = GradientSearch(),
        statistics: Statistics = Statistics(),
        contexts: Contexts | None = None,
        scores: dict[int, float] | None = None,
        history: bool = True,
        seed: int = 0,
        dtype: str = "auto",
        model_kwargs: dict[str, Any] | None = None,
        architecture: Architecture | None = None,
        moments: Mapping[int, Tensor] | None = None,
        evaluation: Evaluation = Evaluation(),
        metrics: Sequence[Metric] = (),
        memory_budget: float | None = None,
        record_texts: bool = True,
        max_relative_update: float = 10.0,
    ) -> None:
        super().__init__(evaluation, metrics)
        self.layers: list[int] = []
        self.strict_loading = False  # a checkpoint has the edited weights only
        self.weighter, self.allocator, self.solver = weighter, allocator, solver
        if layers != "auto":
            self._choose(layers, scores)
        self.targets, self.statistics, self.contexts = targets, statistics, contexts
        self.use_history, self.seed = history, seed
        self.covariances: dict[int, Covariance] = {
            layer: statistics.covariance(moment) for layer, moment in (moments or {}).items()
        }
        for name, limit in (("memory_budget", memory_budget), ("max_relative_update", max_relative_update)):
            if limit is not None and not limit > 0:
                raise ConfigError(f"{name} must be above 0, got {limit}")
        self.max_relative_update, self._before = max_relative_update, 0
        self.budget = None if memory_budget is None else memory_budget * GIB
        self._finished = False
        self._source = base
        self.name = base.name if isinstance(base, LanguageModel) else str(base)
        self.record_texts, self._given = record_texts, self.settings()
        self._loading = {"dtype": dtype, "architecture": architecture, **(model_kwargs or {})}
        if isinstance(base, LanguageModel):
            self._adopt(base)

    # ---- Lightning's hooks, in the order in which they run ----

    def configure_callbacks(self) -> list[L.Callback]:
        """Every Trainer gets ``RestoreState``, once."""
        return [] if any(isinstance(each, RestoreState) for each in self.trainer.callbacks) else [RestoreState()]  # type: ignore[attr-defined]

    def setup(self, stage: str | None = None) -> None:
        """Load the model, if it was given by name and is not here yet."""
        if not isinstance(self._source, LanguageModel):
            self._source = load_model(self._source, **self._loading)
            self._adopt(self._source)

    def on_train_start(self) -> None:
        """Everything that is measured on the unedited model, once every request was seen to fit it."""
        if self.trainer.max_epochs != 1:
            raise ConfigError(f"max_epochs is {self.trainer.max_epochs}; an edit is applied once: use max_epochs=1")
        self._finished, self._before = False, self.journal.edits
        folder, record = run_folder(self.trainer), self.journal.record
        if folder and (record is None or record.folder != folder / "journal"):
            loader = self.trainer.train_dataloader
            asked = [request for records in loader or () for request in records.requests]
            self.open(folder / "journal", asked, getattr(loader, "batch_size", None))
        self.watch_memory()
        with self.journal.reverted():
            self._prepare()

    def _prepare(self) -> None:
        if self.contexts is None:
            self.contexts = generate_contexts(self.lm, self.seed)
        batches: list[EditBatch] = []
        for records in self.trainer.train_dataloader or ():
            batches.append(encode_batch(self.lm, records.requests, self.contexts, first=sum(map(len, batches))))
        with self.phase("trace"):
            if not self.layers:
                proposal = locate(self.lm)
                self._choose(proposal.layers, proposal.scores)
            self.weighter = self.weighter.prepare(self.lm, self.layers)
        for number, batch in enumerate(batches):
            self.estimate(batch, sum(map(len, batches[:number])))
        with self.phase("statistics"):
            missing = [layer for layer in self.layers if layer not in self.covariances]
            if missing:
                self.covariances |= self.statistics.collect(self.lm, missing, budget=self.budget)

    def training_step(self, records: Records, _: int) -> None:
        """Edit a batch; one that an interrupted run did already is done again as recorded."""
        if told := self.journal.replay_next(records.requests):
            self.log_dict(told.numbers, batch_size=len(told.hashes))
        else:
            self.edit(records.requests)

    def edit(self, requests: Sequence[EditRequest]) -> None:
        """Edit one batch: all layers, or, if anything fails, none."""
        assert self.contexts is not None
        batch = encode_batch(self.lm, requests, self.contexts, first=self.journal.edits - self._before)
        given = self.weighter.weigh(self.lm, batch, self.layers)
        weights = checked_weights(self.weighter, given, len(batch), self.layers)
        room = self.estimate(batch)
        with self.journal.batch(batch.requests) as step:
            self.log("n_eff", effective_layers(weights).mean(), batch_size=len(batch))
            reader = FactReader(self.lm, batch, room.passing)
            wanted: dict[Site, Targets] = {}
            for context in self.layer_contexts(weights, batch):
                if context.value_site not in wanted:
                    wanted[context.value_site] = self._find_targets(batch, context.value_site, step, room)
                with self.phase("keys"):
                    keys, prompt_keys, values = reader.read(context.site.layer, context.value_site)
                missing = checked_facts(
                    "what is missing at the value site is",
                    wanted[context.value_site].values - values,
                    batch,
                    context.value_site.layer,
                )
                with self.phase("allocate"), naming(context.site.layer, batch):
                    residual = self.allocator.allocate(missing, context)
                    residual = checked_residual(self.allocator, residual, missing, context)
                with self.phase("solve"):
                    problem = self.problem(context.site.layer, batch, keys, residual, prompt_keys)
                    update = solved(self.solver, problem, context.site.layer, batch, self.max_relative_update)
                self.notify("on_layer_solved", LayerEdit(context, batch, missing, problem, update))
                with self.phase("solve"), naming(context.site.layer, batch):
                    numbers = self.journal.apply(step, context.site.layer, problem, update)
                self._log_turn(context, numbers, len(batch))
            if self.journal.apply_deferred(step):
                reader = FactReader(self.lm, batch, room.passing)
            left = wanted[context.value_site].values - reader.values(context.site.layer, context.value_site)
            self.log("target/left", left.norm(dim=1).mean(), batch_size=len(batch))
            self.notify("on_batch_edited", left)

    def on_train_batch_end(self, *_: Any) -> None:
        """Log the most memory that editing took beyond the model so far, in GiB; after the last batch, finish."""
        self.log("memory/peak", max(peak for phase, peak in self.peaks.items() if phase != "evaluation") / GIB)
        if self.trainer.is_last_batch:  # before the last validation, which must see what the run leaves behind
            self._finish()

    def on_train_end(self) -> None:
        """Finish a run that was stopped earlier."""
        self._finish()

    def _finish(self) -> None:
        """What a solver does once, after all batches."""
        if not self._finished:
            self.journal.finish(self.solver.finish)
        self._finished = True

    def open(self, folder: Path, requests: Sequence[EditRequest], batch_size: int | None) -> None:
        """Keep the journal in a folder from now on: see ``Journal.open``.

        Args:
            folder: Where; a run that was interrupted there goes on.
            requests: All that are edited in this run.
            batch_size: Edits in a batch.
        """
        data = hashlib.sha256("".join(map(request_hash, requests)).encode()).hexdigest()
        run = {
            "model": self.name,
            "settings": self._given,
            "edits": len(requests),
            "batch_size": batch_size,
            "data": data,
        }
        self.setup()
        self.journal.open(JournalStore(folder, texts=self.record_texts), run)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the edited weights only: the others are the model's own."""
        sites = [Site(layer, "mlp_out") for layer in sorted(self.journal.originals)]
        names = {f"model.{self.lm.architecture.path(site)}.weight": self.lm.weight(site.layer) for site in sites}
        checkpoint["state_dict"] = {name: weight.detach() for name, weight in names.items()}

    def configure_optimizers(self) -> None:
        """None: weights change by closed form."""

    def settings(self) -> dict[str, Any]:
        """What decides the outcome, as JSON-ready data; no object's address, which is another one in every process."""
        values = {name: getattr(self, name) for name in SETTINGS}
        return {
            name: value if isinstance(value, (int, list)) else re.sub(r" at 0x[0-9a-f]+", "", repr(value))
            for name, value in values.items()
        }

    # ---- the parts of the walk ----

    def layer_contexts(self, weights: Float[Tensor, "*n l"], batch: EditBatch) -> Iterator[LayerContext]:
        """The layers to edit in ascending order; those of weight 0 are left out."""
        active = [i for i, positive in enumerate((weights > 0).reshape(-1, len(self.layers)).any(0)) if positive]
        layers = [self.layers[place] for place in active]
        for index, layer in enumerate(layers):
            value_site = self.targets.site(layers[-1] if self.allocator.residual_at == "last" else layer)
            chain = ModelJacobian(self.lm, batch, layers[index:], value_site)
            yield LayerContext(Site(layer, "mlp_out"), value_site, index, weights[..., active], chain)

    def estimate(self, batch: EditBatch, waiting: int = 0) -> Footprint:
        """The memory that a batch takes beyond the model, and how it keeps to the budget.

        Args:
            batch: The facts.
            waiting: Facts that are edited before them, those of the journal aside.

        Raises:
            ConfigError: If the budget is too small.
        """
        seen = waiting + self.journal.edits if self.use_history else 0
        tokens, matrices = self.targets.max_tokens, self.solver.total_matrices()
        return Footprint.estimate(
            self.lm, batch, self.layers, tokens=tokens, budget=self.budget, seen=seen, matrices=matrices
        )

    def _choose(self, layers: Sequence[int], scores: dict[int, float] | None) -> None:
        """Settle the candidate layers, and the scores of a weighter that was given none."""
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0:
            raise ConfigError(
                f"layers must be block indices in ascending order, got {layers!r}; e.g. [9, 10, 11] or auto"
            )
        self.weighter = self.weighter.with_scores(scores)
        self.weighter.check(layers)
        self.layers = list(layers)

    def _adopt(self, lm: LanguageModel) -> None:
        if self.layers and self.layers[-1] >= lm.depth:
            raise ConfigError(f"layer {self.layers[-1]} is not in the model, which has blocks 0 to {lm.depth - 1}")
        for layer in self.layers:
            lm.weight(layer)
        self.lm, self.journal = lm, Journal(lm)
        if lm.sharded:  # out of the sight of Lightning, which moves every submodule to one device
            self.__dict__["model"] = lm.model
        else:
            self.model = lm.model

    def _find_targets(self, batch: EditBatch, value_site: Site, step: EditStep, room: Footprint) -> Targets:
        bar = tqdm(total=len(batch), desc=f"target values, layer {value_site.layer}", unit="edit", delay=2, leave=False)
        settings = self.targets if self.solver.needs_targets else replace(self.targets, steps=1)
        settings = replace(settings, max_tokens=room.tokens)
        with self.phase("targets"), bar:
            parts = [settings.optimize(self.lm, part, value_site.layer, bar.update) for part in batch.split(room.facts)]
        found = Targets.join(parts)
        checked_facts("target values are", found.values, batch, value_site.layer)
        numbers = {"loss": found.loss, "probability": found.probability, "steps": found.steps.double()}
        self.log_dict({f"target/{name}": value.mean() for name, value in numbers.items()}, batch_size=len(batch))
        rows = zip(*(value.tolist() for value in numbers.values()), strict=True)
        step.values[value_site.layer] = found.values.cpu()
        step.targets += [{"layer": value_site.layer, **dict(zip(numbers, row, strict=True))} for row in rows]
        return found

    def problem(
        self,
        layer: int,
        batch: EditBatch,
        keys: Float[Tensor, "n d_in"],
        residual: Float[Tensor, "n d_out"],
        prompt_keys: Float[Tensor, "n d_in"],
    ) -> LayerProblem:
        """What the solver is asked at a layer, under the weights and the history as they are now."""
        for each in (keys, prompt_keys):
            checked_facts("keys are", each, batch, layer)
        return LayerProblem(
            keys,
            residual,
            weight=self.lm.oriented(layer).to(keys.device),
            original_weight=self.journal.origin(layer).to(keys.device),
            covariance=self.covariances[layer].to(keys.device),
            history=self.journal.history(layer) if self.use_history else KeyHistory(),
            prompt_keys=prompt_keys,
            loss=WeightLoss(self.lm, batch, layer),
        )

    def _log_turn(self, context: LayerContext, numbers: dict[str, float], size: int) -> None:
        if isinstance(self.allocator, ShareAllocator):
            numbers["share"] = float(self.allocator.shares(context.weights)[..., context.index].mean())
        self.log_dict({f"layer{context.site.layer}/{name}": value for name, value in numbers.items()}, batch_size=size)
