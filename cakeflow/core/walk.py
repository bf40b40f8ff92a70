"""The walk of one edit, top to bottom: weigh layers, find targets, share the residual, solve, change weights, ask."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cakeflow.allocators.base import LayerContext, ShareAllocator
from cakeflow.core.callback import LayerEdit
from cakeflow.core.contracts import (
    arrival,
    check_arrival,
    checked_facts,
    checked_parts,
    checked_residual,
    checked_weights,
    naming,
    require_search,
    solved,
    warn_not_taken,
    warn_replaced,
)
from cakeflow.core.decoys import decoy_keys
from cakeflow.core.memory import give_back
from cakeflow.errors import EditError, NotTakenWarning
from cakeflow.evaluation.scoring import score_rows
from cakeflow.forward.fact_tokens import FactBatch
from cakeflow.forward.jacobian import ModelJacobian
from cakeflow.forward.keys import FactReader
from cakeflow.forward.progress import counting_steps, progress_bar
from cakeflow.forward.residual_path import NormPath, ResidualPath
from cakeflow.forward.tokens import TextBatch
from cakeflow.journal.changes import WeightChange
from cakeflow.journal.schema import FactBody, Reason, TargetBody
from cakeflow.journal.steps import EditStep, importance_at
from cakeflow.models.architecture import Site
from cakeflow.ranks import spread
from cakeflow.solvers.problem import LayerProblem, Update
from cakeflow.targets.base import Targets
from cakeflow.weighters.base import effective_layers

if TYPE_CHECKING:
    from cakeflow.core.locate_then_edit import LocateThenEdit


SAME_KEY = 1e-4
"""Distance of two keys, in norms, below which only rounding parts them."""
LIKELY = 0.6
"""Probability of a target below which its search is the reason that a fact did not take."""


class Walk:
    """The walk of one batch over the edited layers; facts that did not take are walked again.

    Attributes:
        batch: n entries of the facts, each with one key at every layer: what this class calls facts.
        leave_out: Hashes of requests whose earlier keys are not to be preserved; None before the first layer.

    Args:
        module: The edit method.
        facts: The requests and their entries.
        step: The journal's open batch.
    """

    def __init__(self, module: LocateThenEdit, facts: FactBatch, step: EditStep) -> None:
        self.module, self.facts, self.batch, self.step = module, facts, facts.texts, step
        step.owners = facts.owners
        self.footprint = module.footprints[facts.numbers]
        self.leave_out: Sequence[str] | None = None
        self.targets: dict[Site, Targets] = {}
        self.walks, self.arrived = [0] * len(self.batch), [0.0] * len(self.batch)
        weights = module.weighter.weigh(module.lm, self.batch, module.layers)
        self.weights = checked_weights(module.weighter, weights, len(self.batch), module.layers)
        self.log("n_eff", effective_layers(self.weights).mean())

    def over(self, facts: Sequence[int]) -> None:
        """Edit layer by layer, from below, so that some facts take; at the keys of the others nothing is to change.

        Args:
            facts: Places of the facts in the batch; all of them the first time.
        """
        for i in facts:
            self.walks[i] += 1
        reader, searched, contexts = self.reader(), set[Site](), list(self.contexts(facts))
        for context in contexts:
            if context.value_site not in searched:
                self.search(context.value_site, facts)
                searched.add(context.value_site)
                if self.module.allocator.residual_at == "forward":
                    searched |= self.carry(context.value_site, [each.value_site for each in contexts[1:]], facts)
            self.edit_layer(context, reader, facts)
        if self.apply_deferred() or len(searched) > 1:
            reader = self.reader()
        remaining, arrived = arrival(reader, self.targets, self.module.site)
        for i in facts:
            self.arrived[i] = float(arrived[i])
        if self.is_first:
            self.log("target/left", remaining.norm(dim=1).mean())
            self.module.notify("on_batch_edited", remaining)
        self.probability, self.taken, self.entries_taken = self.ask()

    def again(self, facts: Sequence[int]) -> bool:
        """Walk once more over some facts; False if that failed: it is taken back, and the batch stays as it was."""
        count, before = len(self.step.changes), (list(self.walks), list(self.arrived), dict(self.targets))
        try:
            self.over(facts)
        except EditError as error:
            self.module.journal.drop(self.step, count)
            self.walks, self.arrived, self.targets = before
            self.record_targets()
            warnings.warn(f"a further walk was taken back, the batch stays: {error}", NotTakenWarning, stacklevel=2)
            return False
        return True

    def edit_layer(self, context: LayerContext, reader: FactReader, facts: Sequence[int]) -> None:
        """Change one weight by the layer's part of what remains of some facts."""
        module = self.module
        with module.phase("keys"):
            keys, prompt_keys, values = reader.read(context.site, context.value_site)
            path = module.paths.at(reader.prompts, context.site) if module.writes_blocks else ResidualPath()
        if self.leave_out is None:
            self.leave_out = self.replaced(module.lm.weight_name(context.site), keys)
        residual = (self.targets[context.value_site].values - values)[facts]
        gap, share = torch.zeros_like(values), torch.zeros_like(values)
        gap[facts], share[facts] = residual, self.allocate(residual, context, self.batch.part(facts))
        with module.phase("solve"):
            problem = module.problem(context.site, self.batch, keys, path.required(share), prompt_keys, self.leave_out)
            decoys, undoes = partial(decoy_keys, module, context.site, self.facts.requests), self.step.undoes >= 0
            problem = replace(problem, gap=None if undoes else gap, index=context.index, decoys=decoys)
            update = solved(module.solver, problem, context.site.layer, self.batch, module.max_relative_update)
        if self.is_first:
            module.notify("on_layer_solved", LayerEdit(context, self.batch, residual, share, problem, update))
        self.apply(context, problem, update)

    def replaced(self, place: str, keys: Float[Tensor, "n d_in"]) -> list[str]:
        """Return the facts of earlier batches that have a key of this batch, whose new value takes the old one's place.

        A key cannot keep one value and take another, so the solve is not to preserve theirs; a warning names them, and
        they are recorded with the batch, so that no later one preserves them. Not so where the solver weighs
        conflicts: it is given all keys. Facts that are out of force count too: they may be in force again once others
        are not.
        """
        journal, own = self.module.journal, self.step.key_hashes
        earlier = journal.histories.recorded(place, journal.steps)
        if earlier.keys is None:
            return []
        same = (torch.cdist(keys, earlier.keys) / keys.norm(dim=1, keepdim=True) < SAME_KEY).nonzero().tolist()
        pairs = [(own[i], earlier.facts[j]) for i, j in same]
        on_record, in_force = set(earlier.facts), set(journal.history(place).facts)
        pairs += [(name, name) for name in own if name in on_record]  # edited again, though its contexts may differ
        for new, old in () if self.module.solver.weighs_conflicts else dict.fromkeys(pairs):
            self.step.replaced.setdefault(new, []).append(old)
        names = [*dict.fromkeys(old for _, old in pairs)]
        if losing := [name for name in names if name in in_force]:
            warn_replaced(self.batch, sorted({i for i, _ in same}), journal, losing)
        return [] if self.module.solver.weighs_conflicts else names

    def reader(self) -> FactReader:
        """A reader of the batch's keys and values that begins at the bottom."""
        return FactReader(self.module.lm, self.batch, self.footprint.pass_tokens, self.module.tile)

    @property
    def is_first(self) -> bool:
        """True in the walk over all facts."""
        return max(self.walks) == 1

    def contexts(self, facts: Sequence[int]) -> Iterator[LayerContext]:
        """The layers to edit for some facts, ascending; those of weight 0 are left out, but for the value site's."""
        module, batch, is_last = self.module, self.batch.part(facts), self.module.allocator.residual_at == "last"
        weights = self.weights[facts] if self.weights.dim() == 2 else self.weights
        own, all_facts = ((each > 0).reshape(-1, len(module.layers)).any(0) for each in (weights, self.weights))
        top = int(all_facts.nonzero().max()) if is_last else -1  # the value site is that of all facts
        active = [i for i, positive in enumerate(own) if positive or i == top]
        layers = [module.layers[i] for i in active]
        for index, layer in enumerate(layers):
            value_site = module.targets.value_site(layers[-1] if is_last else layer)
            linear_map, site = ModelJacobian(module.lm, batch, layers[index:], value_site), Site(layer, module.site)
            yield LayerContext(site, value_site, index, weights[..., active], linear_map, batch.name)

    def search(self, value_site: Site, facts: Sequence[int]) -> None:
        """Search the target values of some facts, in parts that fit into memory and are spread over the ranks."""
        module, layer, batch = self.module, value_site.layer, self.batch.part(facts)
        bar = progress_bar(len(batch), f"target values, layer {layer}", "fact")
        with module.phase("targets"), bar:
            stream = FactReader(module.lm, batch, self.footprint.pass_tokens).prompts
            path = module.paths.ahead(stream, Site(layer, module.site)) if module.writes_blocks else ResidualPath()
            part_of = module.targets.at(module.site) if isinstance(path, NormPath) else module.targets
            most, fitting = self.footprint.suffix_tokens, self.footprint.facts
            size = len(batch) if module.targets.one_by_one else min(fitting, module.tile or fitting)
            parts = checked_parts(batch, size, strict=module.max_bytes is not None)

            def run(part: Sequence[int]) -> Targets:
                if not module.solver.needs_targets:
                    return part_of.measure(module.lm, batch.part(part), layer, max_tokens=most)
                options: dict[str, Any] = {"progress": counting_steps(bar), **self.importance(layer)}
                return part_of.search(module.lm, batch.part(part), layer, max_tokens=most, **options)

            targets = Targets.join(spread(parts, run), parts).to(module.lm.device)
            if isinstance(path, NormPath):
                reached = path.output + path.reached(targets.values - targets.initial)
                targets = replace(targets, values=reached, initial=path.output)
        give_back()  # what the search took is more than what is needed from here on
        checked_facts("target values are", targets.values, batch, layer)
        require_search(targets, batch, layer)
        if self.is_first:
            for name in ("loss", "probability", "steps"):
                self.log(f"target/{name}", getattr(targets, name).double().mean())
            self.log("target/norm", targets.values.norm(dim=1).mean())
            self.log("target/unchanged", (targets.values == targets.initial).all(1).double().mean())
        self.note_targets(value_site, facts, targets)

    def carry(self, value_site: Site, above: Sequence[Site], facts: Sequence[int]) -> set[Site]:
        """Carry the target values of some facts to the value sites of higher layers, in the model as it is.

        One forward pass of the bare prompts with the values in place gives what each higher layer should reach (FE).
        """
        if not above:
            return set()
        searched, stream = self.targets[value_site], self.reader().prompts
        with self.module.phase("targets"):
            values = stream.carry(value_site, searched.values, above)
            present = stream.carry(value_site, None, above)
        for site, each in values.items():
            checked_facts("target values are", each, self.batch, site.layer)
            steps = torch.zeros_like(searched.steps)
            carried = replace(searched, values=each, initial=present[site], steps=steps, importance=None)
            self.note_targets(site, facts, carried.part(facts))
        return set(above)

    def importance(self, layer: int) -> dict[str, Tensor | None]:
        """What earlier batches found important at a layer, as an argument of a search that takes it."""
        if not self.module.targets.needs_importance:
            return {}
        total = importance_at(self.module.journal.steps, layer)
        return {"importance": None if total is None else total.to(self.module.lm.device)}

    def note_targets(self, value_site: Site, facts: Sequence[int], targets: Targets) -> None:
        """Keep the targets of some facts in the place of earlier ones."""
        earlier = self.targets.get(value_site)
        self.targets[value_site] = targets if earlier is None else earlier.updated(facts, targets)
        self.record_targets()

    def record_targets(self) -> None:
        """Store the target values, and how their search ended, with the batch."""
        self.step.values = {site.layer: each.values.cpu() for site, each in self.targets.items()}
        important = {site.layer: each.importance for site, each in self.targets.items()}
        if self.module.targets.needs_importance:
            self.step.importance = {layer: each.cpu() for layer, each in important.items() if each is not None}
        self.step.targets = [
            TargetBody(layer=site.layer, loss=loss, probability=probability, steps=steps)
            for site, each in self.targets.items()
            for loss, probability, steps in zip(
                each.loss.tolist(), each.probability.tolist(), each.steps.tolist(), strict=True
            )
        ]

    def allocate(
        self, residual: Float[Tensor, "n d_out"], context: LayerContext, batch: TextBatch
    ) -> Float[Tensor, "n d_out"]:
        """The part of some facts' residual that the layer takes."""
        layer, allocator = context.site.layer, self.module.allocator
        checked_facts("residuals at the value site are", residual, batch, context.value_site.layer)
        with self.module.phase("allocate"):
            with naming(layer, batch):
                share = allocator.allocate(residual, context)
            return checked_residual(allocator, share, residual, context)

    def apply(self, context: LayerContext, problem: LayerProblem, update: Update) -> None:
        """Add the update to the weight, and log the layer's numbers."""
        module, layer, norm = self.module, context.site.layer, update.norm()
        weight = float(torch.linalg.vector_norm(problem.weight, dtype=torch.float64))
        residual = float(problem.residual.norm(dim=1).mean())
        numbers = (
            {"residual": residual, "update": norm, "relative_update": norm / weight} | context.numbers | update.numbers
        )
        if isinstance(module.allocator, ShareAllocator):
            numbers["share"] = float(module.allocator.shares(context.weights)[..., context.index].mean())
        keys = self.keys_to_preserve(problem)
        values = problem.values.cpu() if len(keys) else None
        change = WeightChange(module.lm.weight_name(context.site), update.to("cpu"), keys, values)
        with module.phase("solve"), naming(layer, self.batch):
            module.journal.apply(self.step, change, numbers)
        if self.is_first:
            for name, value in numbers.items():
                self.log(f"layer{layer}/{name}", value)

    def keys_to_preserve(self, problem: LayerProblem) -> Float[Tensor, "n d_in"]:
        """Keys that later batches should preserve at the layer: those of the batch."""
        return problem.keys.cpu()

    def apply_deferred(self) -> bool:
        """Put each deferred update in the place of the one that it was deferred for; True if there was any."""
        deferred = False
        for index, part in enumerate(self.step.changes):
            change = part.change
            if isinstance(change, WeightChange) and (update := change.update.deferred) is not None:
                numbers = part.numbers | {"update": update.norm()}
                self.module.journal.replace(self.step, index, replace(change, update=update), numbers)
                deferred = True
        return deferred

    # ---- asking ----

    def ask(self) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"], Bool[Tensor, " m"]]:
        """Ask each request: probability of its target on the bare prompt, and whether its tokens are the arg-max.

        Last, whether they are in the first context of each entry, such as a chat.
        """
        rows, count = [*self.facts.bare, *(rows[0] for rows in self.batch.rows)], len(self.facts.bare)
        with self.module.phase("ask"):
            probability, taken = score_rows(self.module.lm, rows, self.module.max_bytes)
        return probability[:count], taken[:count], taken[count:]

    def not_taken(self) -> list[int]:
        """The facts that did not take, bare or in their own context, each with all those of the same target value."""
        groups, taken = self.batch.value_groups(), self.taken[self.facts.owners] & self.entries_taken
        failed = {groups[i] for i, each in enumerate(taken.tolist()) if not each}
        return [i for i, group in enumerate(groups) if group in failed]

    def close(self) -> None:
        """Record what became of every request, name those that did not take, and check what arrived."""
        for i, taken in enumerate(self.taken.tolist()):
            own = [place for place, owner in enumerate(self.facts.owners) if owner == i]
            arrived = min(self.arrived[place] for place in own)
            outcome = FactBody(
                taken=taken,
                probability=float(self.probability[i]),
                arrived=arrived,
                walks=max(self.walks[place] for place in own),
                reason="" if taken else self.reason(i, own, arrived),
            )
            self.step.facts.append(outcome)
        self.log("target/arrived", sum(self.arrived) / len(self.arrived))
        self.log("target/taken", self.taken.double().mean())
        warn_not_taken(self.facts, self.step.facts)
        check_arrival(self.arrived, self.batch, self.module.min_arrival, self.module.on_low_arrival)

    def reason(self, i: int, own: Sequence[int], arrived: float) -> Reason:
        """Return why a request did not take.

        Args:
            i: Place of the request.
            own: Places of its entries.
            arrived: Part of the searched change that arrived.
        """
        if self.facts.massive[i] is not None:
            return "blocked"
        if not arrived >= self.module.min_arrival:
            return "arrival"
        searched = min(float(each.probability[place]) for each in self.targets.values() for place in own)
        return "search" if searched < LIKELY else "interference"

    def log(self, name: str, value: float | Tensor) -> None:
        """Log a number of the batch."""
        self.module.log(name, value, batch_size=len(self.facts))
