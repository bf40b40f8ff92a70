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
        replay: Whether earlier edits are replayed.

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
    replay: bool = False

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
        replayed: Replay losses at each step: of earlier groups, and of the current one.
    """

    weight: Float[Tensor, "d_out d_in"]
    activation: float
    losses: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    distances: list[list[float]] = field(default_factory=list)
    irrelevant: list[list[float]] = field(default_factory=list)
    replayed: list[tuple[float, float]] = field(default_factory=list)


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
        self.bias = getattr(getattr(module, "base", module), "bias", None)
        below = [Site(site.layer - 1)] if site.layer else []
        with torch.no_grad(), capture(lm, [*below, site], side="out") as outputs, capture(lm, [site], side="in") as ins:
            self.call(rows)
        self.hidden = outputs[below[0]].detach() if below else None
        self.inputs: Float[Tensor, "rows time d_in"] = ins[site].detach()
        self.main = self.answer(original_weight(lm, site)).detach()

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
        return torch.nn.functional.linear(self.inputs, weight.to(self.inputs.dtype), self.bias)

    def distances(self, answer: Tensor) -> Float[Tensor, "rows time"]:
        """Return the distance of an answer to the projection's at every token."""
        return token_distances(answer, self.main, self.activation)

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
    others: Sequence[Sequence[LearningProblem]] = (),
    own: Sequence[LearningProblem] = (),
) -> Learned:
    """Return a side memory that learned one edit.

    Args:
        problem: The edit.
        weight: The side memory before it.
        mask: True at the entries that may change.
        rule: Learning rate, steps and bounds.
        others: Per earlier group its edits, which are replayed in turn.
        own: For each step the edit of the current group that is replayed.

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
    lists = (learned.losses, learned.margins, learned.distances, learned.irrelevant, learned.replayed)
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
    others: Sequence[LearningProblem],
    own: Sequence[LearningProblem],
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
    if rule.replay and (others or own):
        below = [violation(_replayed(each, leaf) - OTHERS_BELOW) for each in others]
        above = [violation(OWN_ABOVE - _replayed(each, leaf)) for each in own[step : step + 1]]
        parts = [torch.stack(each).mean() if each else loss.new_zeros(()) for each in (below, above)]
        log.replayed.append((float(parts[0].detach()), float(parts[1].detach())))
        loss = loss + parts[0] + parts[1]
    return loss, noted


def _replayed(problem: LearningProblem, leaf: Tensor) -> Tensor:
    return scope_distances(problem.rows, problem.distances(problem.answer(leaf)))[2]
