"""Gradient descent of a side memory on one edit: what enters its block is read once, only what is above runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from math import inf

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cakeflow.errors import ConfigError, NumericalError, require_count
from cakeflow.models import (
    LanguageModel,
    Site,
    capture,
    frozen,
    is_transposed,
    logits_at,
    patch,
    prompt_lengths,
    start_at,
)
from cakeflow_sidememory.distance import Activation, row_distances, token_distances
from cakeflow_sidememory.objective import OTHERS_BELOW, OWN_ABOVE, Margin, likelihood_loss, violation


@dataclass(frozen=True, eq=False)
class EditRows:
    """The texts of one edit: its prompt with its target in several contexts, and an irrelevant text behind them.

    Attributes:
        ids: Token ids, padded.
        mask: True at the tokens that attention sees.
        labels: The token itself where it is to be predicted, else -100.
        counted: True at the tokens that count in the distance of the row, or, in an edited row, of its scope.
        outside: True at the tokens of each edited row that are out of its scope; None where the last row, an
            irrelevant text, stands for that.
        plain: True at the tokens that count in the distance that is noted for the router.
    """

    ids: Int[Tensor, "rows time"]
    mask: Bool[Tensor, "rows time"]
    labels: Int[Tensor, "rows time"]
    counted: Bool[Tensor, "rows time"]
    outside: Bool[Tensor, "edited time"] | None = None
    plain: Bool[Tensor, "rows time"] | None = None

    @property
    def edited(self) -> int:
        """Number of rows with the target."""
        return len(self.ids) - 1

    @property
    def prompts(self) -> Int[Tensor, " rows"]:
        """Number of tokens before the target of each row without padding on the left; all of a text without any."""
        first = (self.labels != -100).int().argmax(1)
        return torch.where(first > 0, first, self.mask.sum(1))

    @cached_property
    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row, position and label of each prediction of a target's token."""
        row, column = (self.labels[: self.edited, 1:] != -100).nonzero(as_tuple=True)
        return row, column, self.labels[row, column + 1]


@dataclass(frozen=True)
class LearningRule:
    """Rules by which a side memory learns an edit; the defaults are WISE's for Llama-2-7B (arXiv 2405.14768).

    Attributes:
        lr: Learning rate of plain gradient descent.
        steps: Most steps on an edit.
        margin: Bounds of the distances; None for no margin.
        decay: Weight decay.
        decay_everywhere: Whether entries outside of the mask decay as well, as in WISE's code.
        clamp: Most change of an entry; None for no limit.
        extra: Added to the number of a target's tokens in its mean loss; 1 in WISE's code.
        rehearsal: Whether earlier edits are rehearsed (WISE, App. B.3, replay): those of other shards are to stay below
            a distance of 5, one of the own shard above 20. It is for texts that go to the most excited of some shards.

    Raises:
        ConfigError: If a number is out of its range.
    """

    lr: float = 1.0
    steps: int = 70
    margin: Margin | None = field(default_factory=Margin)
    decay: float = 1e-5
    decay_everywhere: bool = False
    clamp: float | None = 1.0
    extra: int = 0
    rehearsal: bool = False

    def __post_init__(self) -> None:
        require_count("LearningRule.steps", self.steps, 1)
        require_count("LearningRule.extra", self.extra)
        if not (0 < self.lr < inf and 0 <= self.decay < inf and (self.clamp is None or 0 < self.clamp < inf)):
            raise ConfigError(
                f"lr={self.lr}, decay={self.decay}, clamp={self.clamp}: lr and clamp must be above 0, decay at "
                "least 0, and none of them infinite"
            )


@dataclass(frozen=True, eq=False)
class Learned:
    """A side memory after an edit, and how it got there.

    Attributes:
        weight: Its weight.
        activation: Mean distance of the edit's rows before the last update: the router's threshold.
        losses: Likelihood loss at each step.
        margins: Margin loss at each step.
        distances: Distance of each edited row at each step.
        irrelevant: Distance of what is out of scope at each step.
        rehearsals: Losses of rehearsed edits at each step: of other shards, and of the current one.
    """

    weight: Float[Tensor, "d_out d_in"]
    activation: float
    losses: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    distances: list[list[float]] = field(default_factory=list)
    irrelevant: list[list[float]] = field(default_factory=list)
    rehearsals: list[tuple[float, float]] = field(default_factory=list)


def side_answer(
    inputs: Float[Tensor, "*tokens d_in"], main: Float[Tensor, "*tokens d_out"], change: Float[Tensor, "d_out d_in"]
) -> Float[Tensor, "*tokens d_out"]:
    """Return what a projection says that differs from another one by a change of its weight.

    Without a change it is that other answer, to the bit. Two products with equal weights may differ in their last bits,
    by how their memory is aligned; a distance of such errors has a gradient of length 1, where that of none is 0.
    """
    return main + torch.nn.functional.linear(inputs, change.to(inputs.dtype))


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """A learned edit as later ones rehearse it: the tokens by which the router's threshold of its rows is taken.

    Attributes:
        inputs: What enters the projection at each of these tokens.
        main: What the unedited projection answers there.
        rows: Row of each token.
        base: Weight of the projection.
        activation: Activation of the MLPs.
    """

    inputs: Float[Tensor, "tokens d_in"]
    main: Float[Tensor, "tokens d_out"]
    rows: Int[Tensor, " tokens"]
    base: Float[Tensor, "d_out d_in"]
    activation: Activation

    def distances(self, weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, " rows"]:
        """Return the mean distance of each row if the projection has this weight."""
        answer = side_answer(self.inputs, self.main, weight - self.base)
        distances = token_distances(answer, self.main, self.activation)
        counts = torch.bincount(self.rows)
        return distances.new_zeros(len(counts)).index_add(0, self.rows, distances) / counts.clamp_min(1)


class LearningProblem:
    """One edit at one projection, read once: inputs of the projection and of its block, and the unedited answers.

    Args:
        lm: The model; not changed. A side memory that stands there already is not asked.
        site: The projection.
        rows: The texts.
        activation: Activation of the MLPs.
    """

    def __init__(self, lm: LanguageModel, site: Site, rows: EditRows, activation: Activation) -> None:
        self.lm, self.site, self.rows, self.activation = lm, site, rows, activation
        module = lm.module(site)
        bias = getattr(getattr(module, "base", module), "bias", None)
        below = [Site(site.layer - 1)] if site.layer else []
        with torch.no_grad(), capture(lm, [*below, site], side="out") as outputs, capture(lm, [site], side="in") as ins:
            self.call(rows)
        self.hidden = outputs[below[0]].detach() if below else None
        self.inputs: Float[Tensor, "rows time d_in"] = ins[site].detach()
        self.base = original_weight(lm, site).to(self.inputs.dtype)
        self.main = torch.nn.functional.linear(self.inputs, self.base, bias).detach()

    def call(self, rows: EditRows) -> Tensor:
        """Run the model on the texts, without positions: padding on the left shifts them, as WISE's code has it."""
        right = bool(rows.mask[:, 0].all())
        mask = rows.mask.long() if right else additive_mask(rows.mask, self.lm.dtype)
        named = prompt_lengths(self.lm.model, rows.prompts) if right else nullcontext()
        with named:  # to other memories of the model
            logits: Tensor = self.lm(input_ids=rows.ids, attention_mask=mask, use_cache=False).logits
        return logits

    def answer(self, weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "rows time d_out"]:
        """Return what a projection with this weight says at every token."""
        return side_answer(self.inputs, self.main, weight - self.base)

    def distances(self, answer: Tensor) -> Float[Tensor, "rows time"]:
        """Return the distance of an answer to the projection's at every token."""
        return token_distances(answer, self.main, self.activation)

    @cached_property
    def rehearsal(self) -> Rehearsal:
        """The edit as later ones rehearse it."""
        counted = (self.rows.counted if self.rows.plain is None else self.rows.plain)[: self.rows.edited]
        rows, times = counted.nonzero(as_tuple=True)
        return Rehearsal(self.inputs[rows, times], self.main[rows, times], rows, self.base, self.activation)

    @cached_property
    def edited(self) -> tuple[EditRows, Tensor | None]:
        """The rows with the target, without padding that all of them have on the right, and what enters their block."""
        rows, count = self.rows, self.rows.edited
        right = bool(rows.mask[:, 0].all())
        width = int(rows.mask[:count].sum(1).max()) if right else rows.ids.shape[1]
        parts = (rows.ids, rows.mask, rows.labels, rows.counted)
        hidden = None if self.hidden is None else self.hidden[:count, :width]
        return EditRows(*(part[:count, :width] for part in parts)), hidden

    def label_losses(self, answer: Tensor) -> Float[Tensor, " labels"]:
        """Return the negative log-likelihood of each token of the target if the projection gives this answer.

        The irrelevant text is not run: nothing is predicted there, and no row sees another.
        """
        rows, hidden = self.edited
        row, column, label = self.rows.places
        answer = answer[: len(rows.ids), : rows.ids.shape[1]]
        every = torch.ones(answer.shape[:2], dtype=torch.bool, device=answer.device).nonzero(as_tuple=True)
        start = nullcontext() if hidden is None else start_at(self.lm, self.site.layer, hidden)
        with start, logits_at(self.lm, row, column), patch(self.lm, self.site, answer.flatten(0, 1), *every):
            logits = self.call(rows)[0]
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return torch.nn.functional.cross_entropy(wide, label, reduction="none")


def additive_mask(mask: Bool[Tensor, "rows time"], dtype: torch.dtype) -> Float[Tensor, "rows 1 time time"]:
    """Return the attention mask of padded rows in numbers: a token that sees nothing then sees all tokens alike.

    That is what padding on the left did in the libraries of WISE's code, where it counts in every mean; as a mask of
    truth values it is not defined.
    """
    causal = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=mask.device).tril()
    visible = mask[:, None, None, :] & causal
    return torch.zeros(visible.shape, dtype=dtype, device=mask.device).masked_fill(~visible, torch.finfo(dtype).min)


def original_weight(lm: LanguageModel, site: Site) -> Float[Tensor, "d_out d_in"]:
    """Return the weight of a projection, or of the one behind a side memory, as d_out x d_in."""
    module = lm.module(site)
    module = getattr(module, "base", module)
    weight = module.get_parameter("weight").detach()
    return weight.T if is_transposed(module) else weight


def scope_distances(rows: EditRows, distances: Float[Tensor, "rows time"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the distances of the edited rows, of what is out of scope, and those that the router's threshold takes."""
    means = row_distances(distances, rows.counted)
    edited = means[: rows.edited]
    outer = means[rows.edited :] if rows.outside is None else row_distances(distances[: rows.edited], rows.outside)
    noted = edited if rows.plain is None else row_distances(distances, rows.plain)[: rows.edited]
    return edited, outer, noted


def learn(
    problem: LearningProblem,
    weight: Float[Tensor, "d_out d_in"],
    mask: Bool[Tensor, "d_out d_in"],
    rule: LearningRule,
    others: Sequence[Sequence[Rehearsal]] = (),
    own: Sequence[Rehearsal] = (),
) -> Learned:
    """Return a side memory that learned one edit.

    Args:
        problem: The edit.
        weight: The side memory before it.
        mask: True at the entries that may change.
        rule: Learning rate, steps and bounds.
        others: Per other shard its edits, which are rehearsed in turn.
        own: For each step the edit of this shard that is rehearsed.

    Raises:
        NumericalError: If the loss is not finite.
    """
    base = original_weight(problem.lm, problem.site).to(weight)
    learned, last = Learned(weight, float("inf")), float("inf")
    with frozen(problem.lm), torch.enable_grad():
        for step in range(rule.steps):
            leaf = learned.weight.detach().clone().requires_grad_()
            loss, noted = _loss(problem, leaf, rule, learned, [group[step % len(group)] for group in others], own, step)
            value = float(loss.detach())
            if value != value or value == float("inf"):
                raise NumericalError(f"the loss of the side memory is {value} at step {step}; set lr lower")
            stop = abs(last - value) <= 1e-4 and value <= 0.02
            if stop or step == rule.steps - 1:
                learned = _with(learned, leaf.detach(), float(noted.mean().detach()))
            if stop:
                break
            (gradient,) = torch.autograd.grad(loss, leaf)
            learned = _with(learned, _updated(leaf.detach(), gradient, mask, base, rule), learned.activation)
            last = value
    return learned


def _with(learned: Learned, weight: Tensor, activation: float) -> Learned:
    lists = (learned.losses, learned.margins, learned.distances, learned.irrelevant, learned.rehearsals)
    return Learned(weight, activation, *lists)


def _updated(weight: Tensor, gradient: Tensor, mask: Tensor, base: Tensor, rule: LearningRule) -> Tensor:
    """Return the weight after one step."""
    decayed = rule.decay * weight
    step = gradient * mask + (decayed if rule.decay_everywhere else decayed * mask)
    weight = weight - rule.lr * step
    return weight if rule.clamp is None else torch.minimum(torch.maximum(weight, base - rule.clamp), base + rule.clamp)


def _loss(
    problem: LearningProblem,
    leaf: Tensor,
    rule: LearningRule,
    log: Learned,
    others: Sequence[Rehearsal],
    own: Sequence[Rehearsal],
    step: int,
) -> tuple[Tensor, Tensor]:
    """Return the loss and the distances for the router's threshold; the parts are noted."""
    answer = problem.answer(leaf)
    edited, outer, noted = scope_distances(problem.rows, problem.distances(answer))
    fit = likelihood_loss(problem.label_losses(answer), problem.rows.places[0], problem.rows.edited, rule.extra)
    margin = rule.margin(edited, outer) if rule.margin else fit.new_zeros(())
    log.losses.append(float(fit.detach()))
    log.margins.append(float(margin.detach()))
    log.distances.append(edited.detach().tolist())
    log.irrelevant.append(outer.detach().tolist())
    loss = fit + margin
    if rule.rehearsal and (others or own):
        below = [violation(each.distances(leaf) - OTHERS_BELOW) for each in others]
        above = [violation(OWN_ABOVE - each.distances(leaf)) for each in own[step : step + 1]]
        parts = [torch.stack(each).mean() if each else loss.new_zeros(()) for each in (below, above)]
        log.rehearsals.append((float(parts[0].detach()), float(parts[1].detach())))
        loss = loss + parts[0] + parts[1]
    return loss, noted
