"""The edit method of all closed-form recipes: its parts and settings, and what it prepares before the first edit."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, final

from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from cakeflow.allocators.base import Allocator, ShareAllocator
from cakeflow.allocators.sequential import Sequential
from cakeflow.core.config import shipped
from cakeflow.core.contracts import Outcome, checked_facts, warn_blocked
from cakeflow.core.identity import described, inputs_of
from cakeflow.core.memory import PASS_TOKENS, Footprint, loss_tokens
from cakeflow.core.module import EditModule
from cakeflow.core.reread import checked_interval, renew_keys
from cakeflow.core.statistics import Statistics, points_of
from cakeflow.core.stream import Stream, earlier_requests
from cakeflow.core.undo import UndoWalk
from cakeflow.core.walk import Walk
from cakeflow.data.contexts import Contexts
from cakeflow.data.request import EditRequest, FactToken
from cakeflow.errors import ConfigError, did_you_mean, require_choice, require_count, require_positive
from cakeflow.evaluation.evaluation import Evaluation
from cakeflow.forward.fact_tokens import FactBatch, check_tokens, choose_tokens, with_end
from cakeflow.forward.generation import chat_template, generate_contexts
from cakeflow.forward.loss import WeightLoss
from cakeflow.forward.packing import GIB, pass_bytes
from cakeflow.forward.residual_path import ResidualPaths
from cakeflow.forward.tokens import TextBatch, encode_batch
from cakeflow.journal.changes import WeightChange
from cakeflow.journal.steps import EditStep
from cakeflow.models.architecture import Architecture, Role, Site
from cakeflow.models.language import LanguageModel
from cakeflow.models.projections import check_projections, dequantize
from cakeflow.solvers.base import Solver
from cakeflow.solvers.covariance import Covariance
from cakeflow.solvers.history import KeyHistory
from cakeflow.solvers.least_squares import LeastSquares
from cakeflow.solvers.problem import LayerProblem, Update
from cakeflow.storage.hashing import tensor_hash
from cakeflow.targets.base import TargetSearch
from cakeflow.targets.gradient import GradientSearch
from cakeflow.tracing.window import locate
from cakeflow.weighters.base import Weighter
from cakeflow.weighters.static import Uniform

SETTINGS = (
    "layers", "site", "seed", "use_history", "weighter", "allocator", "solver", "targets", "statistics", "contexts",
    "evaluation", "memory_budget", "max_relative_update", "min_arrival", "on_low_arrival",
    "fact_token", "chat", "rounds", "repairs", "reread_keys", "end_of_text", "tile",
)  # fmt: skip
"""Attributes of a module that decide the outcome of its edits, beside the model; ``tile`` where it is set."""
TILE = 8
"""Facts that are searched together on several ranks, where ``tile`` is not set."""


@final
class LocateThenEdit(EditModule[TextBatch]):
    """Edits facts by closed-form changes of one projection per layer: MEMIT, AlphaEdit, CAKE and their relatives.

    Args:
        base: An embedded name, hub id, folder or GGUF file of a model, or a ``LanguageModel``. Names load on first use.
        layers: Candidate layers, ascending; the weighter says which of them are edited. ``auto`` traces the model
            before the first edit and takes the window of five that ``locate`` proposes.
        weighter: How much each layer matters.
        allocator: Which share of the remaining residual each layer takes.
        solver: The closed-form weight change.
        targets: The search for target values.
        site: The projection of each layer that is edited: ``mlp_out``, ``attn_out``, or the path of any linear map
            below a block. One that does not write the residual stream needs target values at its own output:
            ``targets.site`` of the same name, and an allocator with ``residual_at="self"``.
        statistics: How the second moments of the keys to preserve are collected.
        contexts: Texts around each prompt; None samples them from the model before the first edit.
        scores: Causal score of each layer of this model, for a ``Scores`` weighter that was given none; with
            ``layers="auto"`` the trace's take their place.
        history: Whether earlier edits' keys are preserved as well (sequential editing).
        seed: Seed of the sampled contexts.
        dtype: Type of the weights when ``base`` is a name, as in ``AutoModelForCausalLM.from_pretrained``.
        model_kwargs: Further arguments of that function: ``device_map``, ``max_memory``, ``attn_implementation`` ...
            Only Python and the command line can have ``trust_remote_code`` there.
        architecture: Module paths, if they cannot be found from the model.
        moments: Known second moments, layer -> C; they replace ``statistics``.
        evaluation: What the model is asked when it is evaluated.
        metrics: Further metrics of every evaluation; see ``EditModule``.
        memory_budget: Most memory in GiB that edits may take beyond the model: target values are searched in parts that
            fit, second moments in several passes, and a batch that cannot fit is refused. None keeps, where
            there is a choice, to the size of the model, 1 to 8 GiB, and refuses nothing.
        record_texts: Whether the ledger has the texts of the requests; it always has their hashes.
        private: Whether only their owner can read the run folders that are made.
        max_relative_update: Largest update of a layer by one batch, in norms of its weight; a larger one has run away,
            and the batch is undone. On SmolLM2, eight facts by six shipped recipes stay below 0.2.
        min_arrival: Least part of each fact's searched change that has to arrive at its value site.
        on_low_arrival: ``warn`` of facts below it, or undo the batch with an ``error``.
        fact_token: Token at which a fact is written, for requests that do not say it: the subject's last one, its first
            one, the one after it, the prompt's last one, or ``auto`` (``choose_tokens``).
        chat: Whether every fact is written as a question in a chat too, where the tokenizer has a chat template: with a
            key of its own there, and the same target value. The papers do without.
        rounds: Most further walks over the facts of a batch that did not take; 0 is what the papers do.
        repairs: Most further batches behind each one, of the facts that do not take then: its own, and those that later
            ones lost, with all of the same key; a fact that a later one contradicts is left as it is. 0 is what the
            papers do.
        reread_keys: Batches after which the keys of all earlier facts are read again in the model as it is then, so
            that solves preserve what it answers now, though edits of lower layers moved the keys (``KeyDrift`` measures
            how far); the values that keys were to get stay. 0 never does: keys are as when their facts were new.
        end_of_text: Whether the end-of-text token is taught with the target, as its last token, so that an answer ends
            there (LocFT); the other papers do without.
        dequantize: Whether quantized projections of these layers, and no others, are replaced by plain ones in place.
        tile: Most facts that are searched, and whose keys are read, together: what is spread over ranks. It decides the
            last bits. None has no such limit in one process, and is 8 on several ranks.

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
        targets: TargetSearch = GradientSearch(),
        site: Role = "mlp_out",
        statistics: Statistics = Statistics(),
        contexts: Contexts | None = None,
        scores: dict[int, float] | None = None,
        history: bool = True,
        seed: int = 0,
        dtype: str = "auto",
        model_kwargs: Mapping[str, object] | None = None,
        architecture: Architecture | None = None,
        moments: Mapping[int, Tensor] | None = None,
        evaluation: Evaluation = Evaluation(),
        metrics: Sequence[Metric] = (),
        memory_budget: float | None = None,
        record_texts: bool = True,
        private: bool = True,
        max_relative_update: float = 10.0,
        min_arrival: float = 0.5,
        on_low_arrival: Outcome = "warn",
        fact_token: FactToken = "auto",
        chat: bool = False,
        rounds: int = 0,
        repairs: int = 0,
        reread_keys: int = 0,
        end_of_text: bool = False,
        dequantize: bool = False,
        tile: int | None = None,
    ) -> None:
        require_choice("on_low_arrival", on_low_arrival, Outcome)
        require_choice("fact_token", fact_token, FactToken)
        require_count("tile", tile, 1, optional=True)
        for label, most in (("rounds", rounds), ("repairs", repairs)):
            require_count(label, most)
            if most and not solver.needs_targets:
                raise ConfigError(f"{label} must be 0 for a solver without target values; got {most}")
        if dequantize and layers == "auto":
            raise ConfigError("dequantize=True needs layers by number: with layers='auto' they are known too late")
        if site != "mlp_out" and not isinstance(allocator, ShareAllocator):
            raise ConfigError(
                f"site is {site!r}, but {type(allocator).__name__} follows the outputs of whole blocks, which are "
                "those of mlp_out alone; use an allocator of shares, such as Sequential"
            )
        loading = {"dtype": dtype, "architecture": architecture, **(model_kwargs or {})}
        super().__init__(base, evaluation, metrics, loading, record_texts=record_texts, private=private)
        self.layers: list[int] = []
        self.site, self.weighter, self.allocator = site, weighter, allocator
        self.solver, self.targets, self.statistics, self.contexts = solver, targets, statistics, contexts
        self.use_history, self.seed, self.reread_keys = history, seed, checked_interval(reread_keys, history=history)
        if layers != "auto":
            self._choose_layers(layers, scores)
        self.covariances: dict[int, Covariance] = {
            layer: statistics.covariance(moment) for layer, moment in (moments or {}).items()
        }
        self.memory_budget, self.max_relative_update = memory_budget, max_relative_update
        require_positive("model", self, "memory_budget", "max_relative_update")
        self.max_bytes = None if memory_budget is None else memory_budget * GIB
        self.dequantize, self.min_arrival, self.on_low_arrival = dequantize, min_arrival, on_low_arrival
        self.fact_token, self.chat, self.end_of_text = fact_token, chat, end_of_text
        self.rounds, self.repairs, self.tile = rounds, repairs, tile
        self.facts, self.footprints = dict[tuple[int, ...], FactBatch](), dict[tuple[int, ...], Footprint]()
        self._settings = self.used_settings()
        if isinstance(base, LanguageModel):
            self.check_model()

    def settings(self) -> dict[str, Any]:
        """Everything beside the model that decides the outcome, as it was given."""
        return self._settings

    def used_settings(self) -> dict[str, Any]:
        """The settings with the chosen layers and the sampled contexts."""
        return {name: described(getattr(self, name)) for name in SETTINGS if name != "tile" or self.tile}

    def use_ranks(self, *, lockstep: bool) -> None:
        """Search in tiles, which are shared out, unless no work is."""
        if lockstep and not self.solver.needs_targets:
            raise ConfigError(f"{type(self.solver).__name__} descends on a whole weight, and the model is sharded")
        if not lockstep:
            self._settings["tile"] = self.tile = self.tile or TILE

    def check_model(self) -> None:
        """Check that the model has the layers, and that their weights can be edited.

        Raises:
            ConfigError: If a layer is not in the model.
            ArchitectureError: If a projection is not there or cannot be edited.
        """
        if self.layers and self.layers[-1] >= self.lm.depth:
            raise ConfigError(f"layer {self.layers[-1]} is not in the model, which has blocks 0 to {self.lm.depth - 1}")
        sites = [Site(layer, self.site) for layer in self.layers]
        for site in sites:
            self.lm.module(self.targets.value_site(site.layer))
        if self.dequantize:
            dequantize(self.lm, sites)
        check_projections(self.lm, sites)

    # ---- before the first edit ----

    def encode(self, requests: Sequence[EditRequest]) -> TextBatch:
        """All requests as tokens, in every context; contexts are sampled here if there are none."""
        if self.contexts is None:
            with self.journal.reverted():
                self.contexts = generate_contexts(self.lm, self.seed)
        if self.chat and self.lm.chats and not self.contexts.chats:
            self.contexts = replace(self.contexts, chats=(chat_template(self.lm),))
        texts = self._encoded(requests, 0)
        check_tokens(texts, self.fact_token)
        return texts

    def _encoded(self, requests: Sequence[EditRequest], first: int) -> TextBatch:
        texts = encode_batch(self.lm, requests, self.contexts or Contexts(), first)
        return with_end(self.lm, texts) if self.end_of_text else texts

    def prepare(self, batches: Sequence[TextBatch]) -> None:
        """Choose layers with their scores and the facts' tokens, estimate memory, and collect second moments."""
        self.paths = ResidualPaths(self.lm)
        with self.phase("trace"):
            self.find_layers()
            self.weighter = self.weighter.within(self.max_bytes).prepare(self.lm, self.layers)
        texts = TextBatch.join(batches)
        count, before = len(texts), earlier_requests(self.journal, texts.requests) if self.repairs else []
        if before:
            texts = TextBatch.join([texts, self._encoded(before, count)])
        self.stream = Stream(texts, self.with_tokens(texts))
        facts = self.stream.facts.part(range(count))
        warn_blocked(facts)
        earlier, place = self.journal.edits, 0
        for batch in batches:
            self.facts[batch.numbers] = part = facts.part(range(place, place + len(batch)))
            self.footprints[batch.numbers] = self.estimate(part.texts, earlier)
            earlier, place = earlier + len(part.texts), place + len(batch)
        with self.phase("statistics"):
            missing = [Site(layer, self.site) for layer in self.layers if layer not in self.covariances]
            if missing:
                windows = self.statistics.windows(self.lm, max(map(self.lm.key_width, missing)))
                collected = self.statistics.collect(self.lm, missing, max_bytes=self.max_bytes, windows=windows)
                self.covariances |= {site.layer: covariance for site, covariance in collected.items()}
                self.inputs["corpus"] = tensor_hash(windows)
                self.convergence = {str(site.layer): points_of(covariance) for site, covariance in collected.items()}
            self.inputs |= inputs_of(self.contexts, self.layers, self.weighter, self.covariances)

    def find_layers(self) -> list[int]:
        """Return the layers; with ``auto`` a trace of the unedited model finds them, and their scores."""
        if not self.layers:
            proposal = locate(self.lm, max_bytes=self.max_bytes)
            self._choose_layers(proposal.layers, proposal.scores)
            self.check_model()
        return self.layers

    def with_tokens(self, texts: TextBatch) -> FactBatch:
        """Facts with the token at which each is written; the unedited model decides where it is not named."""
        keys = self.contexts.keys if self.contexts else None
        return choose_tokens(self.lm, texts, self.fact_token, self.layers[0], self.pass_tokens, keys)

    @property
    def pass_tokens(self) -> int:
        """Most tokens in one forward pass within the memory budget."""
        limit = PASS_TOKENS if self.max_bytes is None else int(self.max_bytes / pass_bytes(self.lm))
        return max(1, min(PASS_TOKENS, limit))

    @property
    def writes_blocks(self) -> bool:
        """True if the target values are outputs of blocks and the edited projections the last ones of their MLPs."""
        return self.targets.site == "block" and self.site == "mlp_out"

    def estimate(self, batch: TextBatch, earlier: int = 0) -> Footprint:
        """Estimate the memory that a batch takes beyond the model, and choose its parts so that it keeps to the budget.

        Args:
            batch: The facts.
            earlier: Number of facts edited before, whose keys are preserved.

        Raises:
            ConfigError: If the budget is too small.
        """
        return Footprint.estimate(
            self.lm,
            batch,
            [Site(layer, self.site) for layer in self.layers],
            max_tokens=self.targets.max_tokens,
            max_bytes=self.max_bytes,
            earlier=earlier if self.use_history else 0,
            matrices=self.solver.total_matrices(),
        )

    def _choose_layers(self, layers: Sequence[int], scores: dict[int, float] | None) -> None:
        """Set the candidate layers, and the scores of a weighter that was given none."""
        if not layers:
            raise ConfigError(
                f"no layers are named for {self.name!r}{did_you_mean(self.name, shipped('model'))}\ngive a shipped "
                "model's, --model_config NAME, or set model.layers to indices in ascending order, e.g. [9, 10], or auto"
            )
        if list(layers) != sorted(set(layers)) or layers[0] < 0:
            raise ConfigError(f"layers must be block indices in ascending order, e.g. [9, 10], or auto; got {layers!r}")
        self.weighter = self.weighter.with_scores(scores)
        self.weighter.check(layers)
        self.layers = list(layers)

    # ---- a batch ----

    def edit(self, batch: TextBatch, step: EditStep) -> None:
        """Edit one batch: walk over the layers, and again for the facts that did not take."""
        renew_keys(self)
        walk = Walk(self, self.facts[batch.numbers], step)
        walk.over(range(len(walk.batch)))
        for _ in range(self.rounds):
            if not (facts := walk.not_taken()) or not walk.again(facts):
                break
        walk.close()

    def lost(self) -> Iterator[TextBatch]:
        """Yield the facts of the stream that the model does not state, at most ``repairs`` times."""
        for _ in range(self.repairs):
            with self.phase("ask"):
                places = self.stream.lost(self.lm, self.journal, self.max_bytes)
            self.log("lost", float(len(places)))
            if not places:
                return
            facts = self.stream.facts.part(places)
            self.facts[facts.numbers] = facts
            self.footprints[facts.numbers] = self.estimate(facts.texts, self.journal.edits)
            yield self.stream.texts.part(places)

    def undo(self, batch: TextBatch, step: EditStep) -> None:
        """Walk some facts of an earlier batch back to where they would be without it."""
        if batch.undo is not None:
            renew_keys(self)
            UndoWalk(self, self.facts[batch.numbers], step).take_back(batch.undo.places)

    def problem(
        self,
        site: Site,
        batch: TextBatch,
        keys: Float[Tensor, "n d_in"],
        residual: Float[Tensor, "n d_out"],
        prompt_keys: Float[Tensor, "n d_in"],
        leave_out: Collection[str] = (),
    ) -> LayerProblem:
        """The solver's problem at a site, under the weights as they are now, and the history but for some facts."""
        for each in (keys, prompt_keys):
            checked_facts("keys are", each, batch, site.layer)
        name = self.lm.weight_name(site)
        history = self.journal.history(name) if self.use_history else KeyHistory()
        changes = [c.update for c in self.journal.changes if isinstance(c, WeightChange) and c.place == name]
        loss = WeightLoss(self.lm, batch, site, loss_tokens(self.lm, site, batch, self.max_bytes))
        return LayerProblem(
            keys,
            residual,
            weight=self.lm.oriented(name).to(keys.device),
            original_weight=self.original_weight(name).to(keys.device),
            covariance=self.covariances[site.layer].to(keys.device),
            history=history.without(leave_out) if leave_out else history,
            prompt_keys=prompt_keys,
            loss=loss,
            tokens=loss.tokens,
            earlier=changes if self.use_history else None,
        )

    # ---- after the last batch ----

    def finish(self) -> None:
        """Give the solver the last word on every edited weight, as a batch without requests."""
        if self.journal.replay_next(()):
            return
        updates: dict[str, Update] = {}
        for name in dict.fromkeys(change.place for change in self.journal.changes):
            weight = self.lm.oriented(name, self.lm.masters.get(name)).detach()
            final_weight = self.solver.finish(self.original_weight(name), weight)
            if final_weight is not weight:
                updates[name] = Update((final_weight.double() - weight).cpu())
        if updates:
            with self.journal.batch(()) as step:
                for name, update in updates.items():
                    change = WeightChange(name, update, update.right[:0])
                    self.journal.apply(step, change, {"update": update.norm()})
