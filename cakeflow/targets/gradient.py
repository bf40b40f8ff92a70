"""Target search by gradient descent on vectors added to the model's activations, all facts of a batch at once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cakeflow.errors import ConfigError, NumericalError, require_positive
from cakeflow.forward.tokens import TextBatch
from cakeflow.models.architecture import Site
from cakeflow.models.hooks import frozen
from cakeflow.models.language import LanguageModel
from cakeflow.targets.base import SEARCH_REMEDY, Targets, TargetSearch, no_progress
from cakeflow.targets.objective import (
    EssenceKL,
    NormDecay,
    Objective,
    ObjectiveTerm,
    SearchProblem,
    TargetLikelihood,
)
from cakeflow.targets.stop import LossBelow, StopRule

log = logging.getLogger(__name__)

TOLERATED_RISE = 0.1
"""Largest rise of a target's negative log-likelihood in a search, in nats: the target becomes a tenth less likely."""


@dataclass(frozen=True)
class GradientSearch(TargetSearch):
    """Adam on a vector added at the subject's last token (ROME 3.1, eq. 4; MEMIT's ``compute_z``).

    The objective of a fact is the sum of the terms below. After each step the vector is pulled back into the ball of
    radius ``clamp |h_0|`` around 0, h_0 being the present output on the bare prompt. The last evaluation makes no step.
    Facts whose keys coincide, and the keys of one fact in and outside a chat, share one vector, which minimises the sum
    of their objectives.

    Attributes:
        steps: Most evaluations of the objective (``v_num_grad_steps``).
        lr: Learning rate of Adam (``v_lr``).
        stride: Length of the first step in radii of the ball, in place of ``lr``: the gradient of a fact is scaled as a
            whole then (``AdamByFact``), which keeps its direction and needs fewer steps.
        betas: Decay rates of Adam's means of the gradient and of its square.
        clamp: Radius of the ball in norms of h_0 (``clamp_norm_factor``).
        site: Module whose output gets the target: ``block``, ``mlp_out``, ``attn_out`` or a path inside the block.
        extra_site: Second module with a vector of its own, searched along and then dropped, so that z need not carry
            all of the fact (PMET, Li et al. 2024, eq. 13: ``attn_out`` beside ``mlp_out``).
        likelihood: Term of the new target; its value is reported as the probability of the target.
        essence: Term that keeps what the subject is, or None.
        decay: Term that keeps the vector short, or None.
        further: Additional terms.
        stop: Rule that ends the search of a fact.
        max_tokens: Most suffix tokens in one pass with gradients; bounds memory.
        one_by_one: Whether facts are searched one after the other, each with the importance of those before it, as
            HSE's code does. Otherwise it is that of the earlier batches for all of a batch, which are searched at once.
    """

    steps: int = 25
    lr: float = 0.1
    stride: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    clamp: float = 0.75
    site: str = "block"
    extra_site: str | None = None
    likelihood: ObjectiveTerm = TargetLikelihood()
    essence: ObjectiveTerm | None = EssenceKL()
    decay: ObjectiveTerm | None = NormDecay()
    further: tuple[ObjectiveTerm, ...] = ()
    stop: StopRule = LossBelow()
    max_tokens: int = 1024
    one_by_one: bool = False

    def __post_init__(self) -> None:
        require_positive("targets", self, "steps", "lr", "clamp", "stride", "max_tokens")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"targets.betas must be two numbers from 0 to below 1, got {self.betas}")
        if not isinstance(self.likelihood, ObjectiveTerm):  # a config's null gets here
            raise ConfigError(f"targets.likelihood must be an ObjectiveTerm, got {self.likelihood!r}")
        if not self.site or self.extra_site in ("", self.site):
            raise ConfigError(
                f"targets.site and extra_site must be two modules of a block, got {self.site!r} and {self.extra_site!r}"
            )

    @property
    def needs_importance(self) -> bool:
        """True if a term does."""
        return any(term.needs_importance for term in self._terms.values())

    @property
    def _terms(self) -> dict[str, ObjectiveTerm]:
        # the order decides the bits: gradients are added term by term
        terms = {"likelihood": self.likelihood, "essence": self.essence, "decay": self.decay}
        terms |= {f"further {index}": term for index, term in enumerate(self.further)}
        return {name: term for name, term in terms.items() if term}

    def search(
        self,
        lm: LanguageModel,
        batch: TextBatch,
        layer: int,
        *,
        max_tokens: int | None = None,
        progress: Callable[[int], object] = no_progress,
        importance: Float[Tensor, " d_out"] | None = None,
    ) -> Targets:
        """Minimise the objective of every fact of the batch."""
        run = partial(self._run, lm, layer=layer, max_tokens=max_tokens or self.max_tokens, progress=progress)
        first, parts = batch.value_groups(), list[Targets]()
        groups = [[i for i, place in enumerate(first) if place == each] for each in dict.fromkeys(first)]
        groups = groups if self.one_by_one else [[*range(len(batch))]]
        for group in groups:
            targets = run(batch.part(group), steps=self.steps, importance=importance)
            parts.append(targets)
            if self.one_by_one and targets.importance is not None:
                importance = targets.importance.sum(0) + (0 if importance is None else importance)
        return Targets.join(parts, groups)

    def measure(self, lm: LanguageModel, batch: TextBatch, layer: int, *, max_tokens: int | None = None) -> Targets:
        """Evaluate the objective once, without a step."""
        return self._run(lm, batch, layer, max_tokens or self.max_tokens, 1, no_progress, None)

    def _run(
        self,
        lm: LanguageModel,
        batch: TextBatch,
        layer: int,
        max_tokens: int,
        steps: int,
        progress: Callable[[int], object],
        importance: Float[Tensor, " d_out"] | None,
    ) -> Targets:
        sites = [Site(layer, name) for name in (self.site, self.extra_site) if name]
        problem = SearchProblem.prepare(lm, batch, sites, max_tokens, importance)
        with frozen(lm), _attention(lm), torch.enable_grad():
            return self._descend(problem, self._objective(problem), steps, progress)

    @torch.no_grad()
    def _objective(self, problem: SearchProblem) -> Objective:
        return Objective({name: term.prepare(problem) for name, term in self._terms.items()})

    def _optimizer(
        self, delta: Float[Tensor, "n sites d_out"], radius: Float[Tensor, "n sites"]
    ) -> torch.optim.Adam | AdamByFact:
        if self.stride is None:
            return torch.optim.Adam([delta], lr=self.lr, betas=self.betas)
        return AdamByFact(delta, self.stride * radius, self.betas)

    def _descend(
        self, problem: SearchProblem, objective: Objective, steps: int, progress: Callable[[int], object]
    ) -> Targets:
        radius = self.clamp * torch.linalg.vector_norm(problem.initial, dim=2)
        groups = _ValueGroups.of(problem)
        radius = groups.least(radius)
        delta = torch.zeros_like(problem.initial, requires_grad=True)
        adam = self._optimizer(delta, radius)
        active = torch.ones_like(radius[:, 0]).bool()
        evaluations, squares = torch.zeros_like(active).long(), torch.zeros_like(problem.initial[:, 0]).double()
        start = final = objective.evaluate(delta, ~active, with_grad=steps > 1)
        for step in range(steps):
            last = step == steps - 1
            value = objective.evaluate(delta, final.solved, with_grad=not last).after(final) if step else start
            _require_finite(problem, value.loss, active, step)
            evaluations += active
            final = final.updated(active, value)
            done = active & (groups.all(self.stop.met(value)) | last)
            active = active & ~done
            progress(int(done.sum()))
            if not bool(active.any()):
                break
            objective = objective.only(active)
            delta.grad = groups.sum(value.grad)
            squares += groups.once(active)[:, None] * delta.grad[:, 0].double().square()
            adam.step()
            _clamp(delta, radius)
        before, after = start.terms["likelihood"], final.terms["likelihood"]
        away = ~groups.all(~_led_away(problem, before, after, evaluations, final.solved))
        final = final.updated(away, start)
        nll = final.terms["likelihood"]
        initial, values = problem.initial[:, 0].double(), (problem.initial + final.delta)[:, 0].double()
        importance = squares / (evaluations - 1).clamp_min(1)[:, None]
        met = self.stop.met(final)
        return Targets(values, initial, final.loss, torch.exp(-nll), evaluations, met, importance, away)


@dataclass(frozen=True, eq=False)
class _ValueGroups:
    """Entries with one vector, which serves all of them: facts whose keys coincide, and a fact's several keys.

    Attributes:
        same: 1 where two entries have the same vector; None if all have their own.
    """

    same: Float[Tensor, "n n"] | None

    @classmethod
    def of(cls, problem: SearchProblem) -> _ValueGroups:
        """Find the entries of a batch that have one vector."""
        first = problem.batch.value_groups()
        if len(set(first)) == len(first):
            return cls(None)
        group = torch.tensor(first, device=problem.initial.device)
        return cls((group == group[:, None]).to(problem.initial))

    def sum(self, gradient: Float[Tensor, "n sites d_out"]) -> Float[Tensor, "n sites d_out"]:
        """Return for each fact the sum of the gradients of its group."""
        return gradient if self.same is None else torch.einsum("ij,j...->i...", self.same, gradient)

    def least(self, radius: Float[Tensor, "n sites"]) -> Float[Tensor, "n sites"]:
        """Return for each entry the least radius of its group."""
        if self.same is None:
            return radius
        return torch.where(self.same[:, :, None] > 0, radius[None], torch.inf).amin(1)

    def once(self, flags: Bool[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Return the flags of the first fact of each group, False for the others."""
        return flags if self.same is None else flags & (self.same.tril(-1).sum(1) == 0)

    def all(self, flags: Bool[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Return True where the flag is set for all facts of the group."""
        return flags if self.same is None else self.same @ (~flags).to(self.same) == 0


class AdamByFact:
    """Adam with one mean square of the gradient per vector, not one per coordinate (Adam-mini, Zhang et al. 2024).

    Args:
        delta: The vectors.
        lr: Length of the first step of each.
        betas: Decay rates of the means of the gradient and of its square.
    """

    def __init__(
        self, delta: Float[Tensor, "n sites d_out"], lr: Float[Tensor, "n sites"], betas: tuple[float, float]
    ) -> None:
        self.delta, self.lengths, self.betas, self.steps = delta, lr[..., None], betas, 0
        self.mean, self.square = torch.zeros_like(delta.detach()), torch.zeros_like(self.lengths)

    @torch.no_grad()
    def step(self) -> None:
        """Make one step against the gradient."""
        gradient, (first, second) = self.delta.grad, self.betas
        assert gradient is not None
        self.steps += 1
        self.mean.lerp_(gradient, 1 - first)
        self.square.lerp_(gradient.square().sum(2, keepdim=True), 1 - second)
        mean, square = self.mean / (1 - first**self.steps), self.square / (1 - second**self.steps)
        self.delta.sub_(self.lengths * mean / square.sqrt().clamp_min(torch.finfo(square.dtype).tiny))


def _attention(lm: LanguageModel) -> AbstractContextManager[None]:
    """Attend by plain products in half precision on a CPU, where flash attention is slow to differentiate."""
    is_slow = lm.device.type == "cpu" and lm.dtype in (torch.bfloat16, torch.float16)
    return sdpa_kernel(SDPBackend.MATH) if is_slow else nullcontext()


def _clamp(delta: Float[Tensor, "n sites d_out"], radius: Float[Tensor, "n sites"]) -> None:
    """Pull every vector that left its ball back onto the sphere; Adam's moments stay, as in the official code."""
    with torch.no_grad():
        length = torch.linalg.vector_norm(delta, dim=2)
        delta.mul_(torch.where(length > radius, radius / length, 1.0)[..., None])


def _require_finite(problem: SearchProblem, loss: Tensor, active: Tensor, step: int) -> None:
    if bool((bad := active & ~torch.isfinite(loss)).any()):
        index = int(bad.nonzero()[0, 0])
        raise NumericalError(
            f"{problem.batch.name([index])}: the loss of its target value at layer {problem.sites[0].layer} is "
            f"{float(loss[index])} at step {step}; lower targets.lr or load the model in float32"
        )


def _led_away(
    problem: SearchProblem,
    start: Float[Tensor, " n"],
    end: Float[Tensor, " n"],
    steps: Int[Tensor, " n"],
    solved: Bool[Tensor, " n"],
) -> Bool[Tensor, " n"]:
    """Return the facts whose search led away from them; log searches without effect.

    The official code writes what such a search ends with. Here a fact keeps its present value, and so does not take;
    where that is so for all of a batch, a setting is at fault (``Walk.search``). Only the NLL is compared: the other
    terms may grow as it falls. A solved fact passes: its NLL may have been near 0 from the start.
    """
    idle = ~solved & (steps > 1) & (end >= start)
    for index in idle.nonzero()[:, 0].tolist():
        log.warning(
            "%s: the search for its target value at layer %d did not lower the target's NLL (%.4g before, %.4g after "
            "%d steps); %s",
            problem.batch.name([index]), problem.sites[0].layer, start[index], end[index], steps[index], SEARCH_REMEDY,
        )  # fmt: skip
    return idle & (end - start > TOLERATED_RISE)
