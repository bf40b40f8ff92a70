"""Factors beside the up projection: one small change of an MLP's neurons per answer, trained on its own.

A3E's training (NeurIPS 2025; official code e2173ac, ``a3e.py`` and ``tuners/melo.py``). An edit is a direction ``a``
(width of the projection's input x) and an output ``b`` (one number per neuron). From the last token of its prompt on,

    up(x) += cos(x, a) * scale * (b * neurons),        scale = sqrt(blocks),

and all else is left as it is. Nothing below the projection depends on the factors, and no token's x does, since the
change is behind the attention of its block. So x and the input of the block are captured once, each step runs that
block and those above it, and logits are computed at the tokens that predict the answer. Edits do not see each other:
many are trained in one pass, each with its own loss, and none depends on which others are trained with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from cakeflow.errors import ConfigError, Fault, RequestError, require_choice, require_count, require_positive
from cakeflow.forward import Row, pad, plan
from cakeflow.models import LanguageModel, Site, capture, frozen, inject, logits_at, prompt_lengths, start_at
from cakeflow_sidememory.neurons import Selection, neuron_scores, require_neurons, select_neurons


@dataclass(frozen=True)
class FactorTraining:
    """Settings of the training; the defaults are the official constants.

    Attributes:
        steps: Number of gradient steps; there is no other stop.
        lr: Learning rate of Adam at the first step.
        halve_every: Steps after which the learning rate is halved, again and again.
        blocks: Number of edits that the official code makes room for at once; only ``scale`` and the draw depend on it.
        share: Share of the neurons that are free for each token of the answer.
        select: Which neurons these are (``Selection``).
        others: Weight of O, which holds down the logits of other tokens.
        last: Weight of C, which makes the change vanish where the answer ends.
        seed: Seed of the directions at the beginning.
        max_tokens: Most tokens that are trained together.

    Raises:
        ConfigError: If a setting is out of its range.
    """

    steps: int = 50
    lr: float = 0.01
    halve_every: int = 20
    blocks: int = 4000
    share: float = 1 / 16
    select: Selection = "lowest"
    others: float = 1.0
    last: float = 8.0
    seed: int = 0
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        require_choice("FactorTraining.select", self.select, Selection)
        for name in ("steps", "halve_every", "blocks", "max_tokens"):
            require_count(f"FactorTraining.{name}", getattr(self, name), 1)
        require_count("FactorTraining.seed", self.seed)
        require_positive("FactorTraining", self, "lr", "share")
        if not (self.lr < inf and self.share <= 1 and 0 <= self.others < inf and 0 <= self.last < inf):
            raise ConfigError(
                f"FactorTraining: lr={self.lr}, share={self.share}, others={self.others}, last={self.last}: share must "
                "be at most 1, the weights of the losses at least 0, and none of them infinite"
            )

    @property
    def scale(self) -> float:
        """Factor of every output."""
        return float(self.blocks**0.5)


@dataclass(frozen=True, eq=False)
class Factors:
    """Factors of n edits of one projection.

    Attributes:
        direction: a of each edit, as trained: its length means nothing.
        output: b of each edit.
        neurons: True for the neurons that an edit may change.
        scale: Factor of every output.
    """

    direction: Float[Tensor, "n d_in"]
    output: Float[Tensor, "n d_out"]
    neurons: Bool[Tensor, "n d_out"]
    scale: float

    def __len__(self) -> int:
        return len(self.direction)

    def part(self, edits: Sequence[int]) -> Factors:
        """The factors of some edits, in that order."""
        chosen = list(edits)
        return Factors(self.direction[chosen], self.output[chosen], self.neurons[chosen], self.scale)

    def to(self, device: torch.device | str) -> Factors:
        """The factors on a device."""
        return Factors(self.direction.to(device), self.output.to(device), self.neurons.to(device), self.scale)

    @classmethod
    def join(cls, parts: Sequence[Factors]) -> Factors:
        """The factors of several groups of edits, one after the other.

        Raises:
            ConfigError: If there are none, they have not the same scale, or are those of different projections.
        """
        widths = {(each.direction.shape[1], each.output.shape[1]) for each in parts}
        if len(widths) > 1:
            raise ConfigError(
                f"factors of projections of widths {sorted(widths)} cannot be joined; edit one projection of one model"
            )
        if len({each.scale for each in parts}) != 1:
            scales = sorted({each.scale for each in parts})
            raise ConfigError(f"factors of scales {scales} cannot be joined; train them with one number of blocks")
        tensors = zip(*((each.direction, each.output, each.neurons) for each in parts), strict=True)
        direction, output, neurons = map(torch.cat, tensors)
        return cls(direction, output, neurons, parts[0].scale)

    def changes(self, inputs: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "n ... d_out"]:
        """Compute what each edit adds to the projection's output at each token."""
        reach = cosines(inputs, self.direction.to(inputs))
        return _changes(reach.movedim(-1, 0), self.output.to(inputs), self.neurons.to(inputs.device), self.scale)


class Losses(NamedTuple):
    """Losses of n edits, at one step or before each of several.

    Attributes:
        likelihood: CE, the mean negative log-likelihood of the answer's tokens.
        others: O, the mean positive part of the other tokens' logits.
        last: C, half of ``|cos|`` at the last token of the answer, where what comes behind it is predicted.
        total: The sum that is minimised.
    """

    likelihood: Float[Tensor, "n ..."]
    others: Float[Tensor, "n ..."]
    last: Float[Tensor, "n ..."]
    total: Float[Tensor, "n ..."]


class _Scene(NamedTuple):
    """Rows that are trained together, and what they have that no step changes."""

    ids: Int[Tensor, "n time"]
    hidden: Float[Tensor, "n time width"]
    row: Int[Tensor, " changed"]
    column: Int[Tensor, " changed"]
    units: Float[Tensor, "changed d_in"]
    ends: Float[Tensor, "n d_in"]
    read_row: Int[Tensor, " read"]
    read_column: Int[Tensor, " read"]
    label: Int[Tensor, " read"]
    prompts: Int[Tensor, " n"]


def cosines(inputs: Float[Tensor, "*tokens width"], directions: Float[Tensor, "n width"]) -> Float[Tensor, "*tokens n"]:
    """Compute the cosine of every token with every direction."""
    cosine: Tensor = normalize(inputs, dim=-1) @ normalize(directions, dim=-1).T
    return cosine


def _changes(
    reach: Float[Tensor, "n ..."], output: Float[Tensor, "n d_out"], neurons: Bool[Tensor, "n d_out"], scale: float
) -> Float[Tensor, "n ... d_out"]:
    return torch.einsum("n...,nd->n...d", reach * scale, output * neurons)


def answer_loss(
    logits: Float[Tensor, "tokens vocabulary"], labels: Int[Tensor, " tokens"]
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """Compute CE and O at each token of an answer, in float32 or the logits' wider type.

    Args:
        logits: Logits where the answer's tokens are predicted.
        labels: These tokens.

    Returns:
        The negative log-likelihood of each token, and the mean over the V - 1 others of the positive part of their
        logits ("incorrect preceding").
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    others = logits.relu().sum(-1) - logits.gather(-1, labels[:, None])[:, 0].relu()
    return cross_entropy(logits, labels, reduction="none"), others / (logits.shape[-1] - 1)


def initial_directions(numbers: Sequence[int], width: int, blocks: int, seed: int = 0) -> Float[Tensor, "n width"]:
    """Draw the directions at the beginning, uniform between +-1/sqrt(blocks).

    ``kaiming_uniform`` on a matrix of width x blocks takes the blocks for the fan-in. Each edit has a generator of its
    own, so that its draw depends on its number only.

    Args:
        numbers: Place of each edit in its run.
        width: Width of the projection's input.
        blocks: See ``FactorTraining``.
        seed: Seed of the run.
    """
    rows = [np.random.default_rng([seed, number]).uniform(-1, 1, width) for number in numbers]
    return torch.from_numpy(np.stack(rows)) / float(blocks**0.5)


@dataclass(frozen=True, eq=False)
class FactorLoss:
    """The losses of n edits as a function of their factors, from the projection's block on.

    Attributes:
        lm: The model; not touched.
        site: The up projection.
        training: Settings.
        neurons: The neurons that each edit may change.
        scene: The rows, and the states that no factor changes.
    """

    lm: LanguageModel
    site: Site
    training: FactorTraining
    neurons: Bool[Tensor, "n d_out"]
    scene: _Scene

    @classmethod
    def of(cls, lm: LanguageModel, rows: Sequence[Row], site: Site, training: FactorTraining) -> FactorLoss:
        """Run the blocks below the projection once, and choose the neurons; arguments as for ``train_factors``."""
        answers = [torch.tensor(row.ids[row.target :]) for row in rows]
        scores = [neuron_scores(lm, site.layer, answer) for answer in answers]
        neurons = torch.stack([select_neurons(each, training.share, training.select) for each in scores])
        return cls(lm, site, training, neurons, _scene(lm, rows, site))

    def __call__(self, direction: Float[Tensor, "n d_in"], output: Float[Tensor, "n d_out"]) -> Losses:
        """Compute the losses; gradients flow to the factors alone."""
        scene, training = self.scene, self.training
        units = normalize(direction, dim=-1)
        reach = (scene.units * units[scene.row]).sum(-1)
        delta = (training.scale * reach)[:, None] * (output * self.neurons)[scene.row]
        logits = self._logits(delta)
        lengths = scene.read_row.bincount(minlength=len(direction))
        likelihood, others = (
            each.new_zeros(len(direction)).index_add(0, scene.read_row, each) / lengths
            for each in answer_loss(logits, scene.label)
        )
        last = (scene.ends * units).sum(-1).abs() / 2
        return Losses(likelihood, others, last, likelihood + training.others * others + training.last * last)

    def _logits(self, delta: Float[Tensor, "changed d_out"]) -> Float[Tensor, "read vocabulary"]:
        lm, scene = self.lm, self.scene
        with (
            frozen(lm),
            start_at(lm, self.site.layer, scene.hidden),
            inject(lm, self.site, delta, scene.column, scene.row),
            logits_at(lm, scene.read_row, scene.read_column),
            prompt_lengths(lm.model, scene.prompts),
            lm.running(),
        ):
            output = lm.model(input_ids=scene.ids, attention_mask=torch.ones_like(scene.ids), use_cache=False)
        logits: Tensor = output.logits[0]
        return logits


@torch.no_grad()
def _scene(lm: LanguageModel, rows: Sequence[Row], site: Site) -> _Scene:
    """Run the blocks below the projection once."""
    ids = pad([row.ids for row in rows], lm.device)
    below = Site(max(site.layer - 1, 0))
    prompts = torch.tensor([each.target for each in rows])
    named = prompt_lengths(lm.model, prompts)
    with named, capture(lm, [below]) as states, capture(lm, [site], side="in", stop=True) as inputs:
        lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    places = [(i, t) for i, row in enumerate(rows) for t in range(row.target - 1, len(row.ids))]
    row, column = torch.tensor(places, device=lm.device).T
    reads = [(i, t, rows[i].ids[t + 1]) for i, t in places if t + 1 < len(rows[i].ids)]
    ends = torch.tensor([len(each.ids) - 1 for each in rows], device=lm.device)
    units = normalize(inputs[site].to(torch.promote_types(inputs[site].dtype, torch.float32)), dim=-1)
    last = units[torch.arange(len(rows), device=lm.device), ends]
    read_row, read_column, label = torch.tensor(reads, device=lm.device).T
    return _Scene(ids, states[below], row, column, units[row, column], last, read_row, read_column, label, prompts)


@dataclass(frozen=True, eq=False)
class TrainedFactors:
    """Factors of n edits, and their losses before each step.

    Attributes:
        factors: The factors, on the model's device.
        losses: Their losses.
    """

    factors: Factors
    losses: Losses


def train_factors(
    lm: LanguageModel,
    rows: Sequence[Row],
    site: Site,
    training: FactorTraining = FactorTraining(),
    start: Float[Tensor, "n d_in"] | None = None,
) -> TrainedFactors:
    """Train the factors of n edits, each on one row "prompt answer"; the model stays as it is.

    ``L = CE + others * O + last * C``, Adam, all as in the official code. Its eleven copies of the row, the row without
    an answer and the token that it appends add nothing but the half in C.

    Args:
        lm: The model.
        rows: For each edit its bare prompt with the answer.
        site: The up projection, officially that of the last block: ``Site(lm.depth - 1, "mlp.up_proj")``.
        training: Settings.
        start: Directions at the beginning (``initial_directions`` by default); outputs begin at 0.

    Returns:
        The factors in float32, or in the model's type if that is wider, and their losses, on the model's device.

    Raises:
        ArchitectureError: If there is no such projection, or it does not write one number per neuron of its block.
        RequestError: If a row has no token of a prompt or of an answer; all are named.
    """
    require_rows(rows)
    require_neurons(lm, site)
    if start is None:
        width = lm.oriented(site).shape[1]
        start = initial_directions(range(len(rows)), width, training.blocks, training.seed)
    groups = plan([len(row.ids) for row in rows], training.max_tokens)
    parts = [_descend(FactorLoss.of(lm, [rows[i] for i in group], site, training), start[group]) for group in groups]
    order = torch.tensor([i for group in groups for i in group]).argsort().tolist()
    losses = (torch.cat(each)[order] for each in zip(*(part.losses for part in parts), strict=True))
    return TrainedFactors(Factors.join([part.factors for part in parts]).part(order), Losses(*losses))


def _descend(loss: FactorLoss, start: Float[Tensor, "n d_in"]) -> TrainedFactors:
    """Train some edits together; each has its own loss, and Adam looks at every number by itself."""
    training = loss.training
    a = start.to(loss.scene.units).clone().requires_grad_()
    b = torch.zeros(loss.neurons.shape, dtype=a.dtype, device=a.device).requires_grad_()
    adam = torch.optim.Adam([a, b], lr=training.lr)
    schedule = torch.optim.lr_scheduler.StepLR(adam, training.halve_every, 0.5)
    history = []
    for _ in range(training.steps):
        with torch.enable_grad():
            losses = loss(a, b)
            a.grad, b.grad = torch.autograd.grad(losses.total.sum(), [a, b])
        adam.step()
        schedule.step()
        history.append(torch.stack(losses).detach())
    factors = Factors(a.detach(), b.detach(), loss.neurons.to(a.device), training.scale)
    return TrainedFactors(factors, Losses(*torch.stack(history, -1)))


def require_rows(rows: Sequence[Row]) -> None:
    """Check that every row has a prompt and an answer.

    Raises:
        RequestError: Naming every row without.
    """
    faults = [
        Fault(i, "prompt", row.ids, "has no token; ask with a text") for i, row in enumerate(rows) if not row.target
    ]
    faults += [
        Fault(i, "target_new", row.ids, "has no token; give an answer")
        for i, row in enumerate(rows)
        if row.target >= len(row.ids)
    ]
    if faults:
        raise RequestError(faults)
