"""The value each fact should have: z, optimised for all requests of a batch at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cakeflow.errors import ArchitectureError, ConfigError, NumericalError
from cakeflow.forward.suffix import Suffixes, cut
from cakeflow.forward.tokens import EditBatch
from cakeflow.models.architecture import Role, Site
from cakeflow.models.hooks import frozen
from cakeflow.models.language import LanguageModel

log = logging.getLogger(__name__)


WORSE = 0.1
"""Rise of a target's negative log-likelihood, in nats, that a search must not end with: a tenth less likely."""


@dataclass(frozen=True, eq=False)
class Targets:
    """Target values and how their optimisation went, one row per fact.

    Attributes:
        values: z, n x d_out, in float64.
        initial: What the model holds now on the bare prompt, n x d_out.
        loss: Full objective at z.
        probability: exp(-mean negative log-likelihood) of the new target at z.
        steps: Evaluations of the objective.
        converged: Whether the loss fell below ``stop_loss``.
    """

    values: Float[Tensor, "n d_out"]
    initial: Float[Tensor, "n d_out"]
    loss: Float[Tensor, " n"]
    probability: Float[Tensor, " n"]
    steps: Int[Tensor, " n"]
    converged: Bool[Tensor, " n"]

    @classmethod
    def join(cls, parts: Sequence[Targets]) -> Targets:
        """Those of several parts of a batch, in their order."""
        return cls(*(torch.cat([getattr(part, each.name) for part in parts]) for each in fields(cls)))


@dataclass(frozen=True)
class GradientSearch:
    """Finds z: Adam on a vector added at the subject's last token (ROME 3.1, eq. 4; MEMIT's ``compute_z``).

    Objective for each fact, over its contexts j, with p the model's prediction at the subject of "{subject} is a":
    ``mean_j NLL_j + kl_factor KL(p_now || p_before) + weight_decay |delta| / |h_0|^2``. The KL runs in this direction
    in the official code, whatever the papers print. After each step delta is pulled back into the ball of radius
    ``clamp |h_0|``. A fact stops once its loss is below ``stop_loss``; the last evaluation makes no step. Facts do not
    influence each other, whoever else is in the batch.

    Attributes:
        steps: Most evaluations of the objective (``v_num_grad_steps``).
        lr: Of Adam (``v_lr``).
        clamp: Radius of the ball, in norms of h_0 (``clamp_norm_factor``).
        kl_factor: Weight of the KL term.
        weight_decay: Weight of the decay term (``v_weight_decay``).
        stop_loss: Where a fact is done.
        role: Which output of the value site layer is optimised.
        also: A further output of that layer with a delta of its own, optimised along and then dropped, so that z need
            not carry all of the fact (PMET, Li et al. 2024, eq. 13: ``attn_out`` beside ``mlp_out``).
        ease: Factor of a fact's NLL while all tokens of its target are the most likely ones (PMET's code: 0.1).
        stop_kl: A fact whose target is the most likely one is done once its KL is below this (PMET's code: 0.01).
        max_tokens: Most suffix tokens in one forward and backward pass; bounds memory, changes no result.
    """

    steps: int = 25
    lr: float = 0.1
    clamp: float = 0.75
    kl_factor: float = 0.0625
    weight_decay: float = 0.5
    stop_loss: float = 0.05
    role: Role = "block"
    also: Role | None = None
    ease: float = 1.0
    stop_kl: float = 0.0
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        for name in ("steps", "lr", "clamp", "max_tokens"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"targets.{name} must be above 0, got {getattr(self, name)}")
        if self.role not in get_args(Role):
            raise ConfigError(f"targets.role must be one of {get_args(Role)}, got {self.role!r}")
        if self.also not in (None, *get_args(Role)) or self.also == self.role:
            raise ConfigError(f"targets.also must be another one of {get_args(Role)}, got {self.also!r}")
        if not 0 < self.ease <= 1 or not self.stop_kl >= 0:
            raise ConfigError(
                f"targets.ease must lie in (0, 1] and stop_kl be 0 or more, got {self.ease}, {self.stop_kl}"
            )

    def site(self, layer: int) -> Site:
        """Where z lives for a layer."""
        return Site(layer, self.role)

    def optimize(
        self, lm: LanguageModel, batch: EditBatch, layer: int, progress: Callable[[int], object] = lambda done: None
    ) -> Targets:
        """Find the target values of a batch under the model's weights as they are now.

        Args:
            lm: The model; its weights and gradients are not touched.
            batch: n facts.
            layer: The value_site layer.
            progress: Called after each step with the number of facts that became done.

        Returns:
            Target values at ``self.site(layer)``.

        Raises:
            NumericalError: If a loss is not finite, or a search made its target less likely; the request is named.
        """
        sites = [self.site(layer), *([Site(layer, self.also)] if self.also else [])]
        problem = _Problem.prepare(lm, batch, sites, self.max_tokens)
        with frozen(lm), torch.enable_grad():
            return self._descend(problem, batch, layer, progress)

    def _descend(self, problem: _Problem, batch: EditBatch, layer: int, progress: Callable[[int], object]) -> Targets:
        initial = problem.initial
        norm = torch.linalg.vector_norm(initial, dim=2)
        delta = torch.zeros_like(initial, requires_grad=True)
        adam = torch.optim.Adam([delta], lr=self.lr)
        final, factor = delta.detach().clone(), torch.ones_like(norm[:, 0])
        loss, nll, steps = torch.zeros_like(factor), torch.zeros_like(factor), torch.zeros_like(factor).long()
        active = torch.ones_like(factor).bool()
        start, stated = nll, active
        for step in range(self.steps):
            last = step == self.steps - 1
            now = problem.evaluate(self, delta.detach(), norm, factor, with_grad=not last)
            _require_finite(now.loss, active, batch, layer, step)
            start = now.nll if step == 0 else start
            steps += active
            loss, nll = torch.where(active, now.loss, loss), torch.where(active, now.nll, nll)
            stated = torch.where(active, now.top, stated)
            done = active & ((now.loss < self.stop_loss) | (now.top & (now.kl < self.stop_kl)) | last)
            factor = torch.where(now.top, self.ease, 1.0).to(factor)
            final[done] = delta.detach()[done]
            active = active & ~done
            progress(int(done.sum()))
            if not bool(active.any()):
                break
            problem = problem.only(active)
            delta.grad = now.grad
            adam.step()
            _clamp(delta, self.clamp * norm)
        _require_fallen(start, nll, steps, stated, batch, layer)
        values = (initial + final)[:, 0].double()
        return Targets(values, initial[:, 0].double(), loss, torch.exp(-nll), steps, loss < self.stop_loss)


def _clamp(delta: Float[Tensor, "n sites d_out"], radius: Float[Tensor, "n sites"]) -> None:
    """Pull every vector that left its ball back onto the sphere; Adam's moments stay, as in the official code."""
    with torch.no_grad():
        length = torch.linalg.vector_norm(delta, dim=2)
        delta.mul_(torch.where(length > radius, radius / length, 1.0)[..., None])


def _require_finite(loss: Tensor, active: Tensor, batch: EditBatch, layer: int, step: int) -> None:
    if bool((bad := active & ~torch.isfinite(loss)).any()):
        index = int(bad.nonzero()[0, 0])
        raise NumericalError(
            f"{batch.name([index])}: the loss of its target value at layer {layer} is {float(loss[index])} at step "
            f"{step}; lower targets.lr or load the model in float32"
        )


def _require_fallen(start: Tensor, end: Tensor, steps: Tensor, stated: Tensor, batch: EditBatch, layer: int) -> None:
    """A search that led away from its fact must not become an edit, though the official code goes on.

    Compared is the NLL, which is all of the loss at the start; KL and decay may grow as it falls. A search that merely
    got nowhere is logged: the official recordings on random models have such. A fact that the model states at the value
    found is fine: it may have stated it before, its NLL near 0.
    """
    for index in (~stated & (steps > 1) & (end >= start)).nonzero()[:, 0].tolist():
        message = (
            f"{batch.name([index])}: the search for its target value at layer {layer} did not lower the target's NLL "
            f"({float(start[index]):.4g} before, {float(end[index]):.4g} after {int(steps[index])} steps); lower "
            "targets.lr, targets.kl_factor or targets.weight_decay, or leave the request out"
        )
        if float(end[index] - start[index]) > WORSE:
            raise NumericalError(message)
        log.warning(message)


@dataclass(frozen=True, eq=False)
class _Evaluation:
    """The objective at one delta, fact by fact; ``top``: all tokens of the target are the most likely ones."""

    loss: Float[Tensor, " n"]
    nll: Float[Tensor, " n"]
    kl: Float[Tensor, " n"]
    top: Bool[Tensor, " n"]
    grad: Float[Tensor, "n sites d_out"]


@dataclass(frozen=True, eq=False)
class _Problem:
    """The objective of one batch, cut down to what depends on delta."""

    lm: LanguageModel
    sites: Sequence[Site]
    contexts: int
    initial: Float[Tensor, "n sites d_out"]
    prompts: list[Suffixes]
    essence: list[Suffixes]
    reference: list[Tensor]

    @classmethod
    def prepare(cls, lm: LanguageModel, batch: EditBatch, sites: Sequence[Site], budget: int) -> _Problem:
        rows = [row for variants in batch.rows for row in variants]
        width = len(batch.weights)
        prompts, outputs = cut(lm, rows, [i // width for i in range(len(rows))], sites, budget)
        essence, _ = cut(lm, batch.essence, range(len(batch)), sites, budget, read_first=True)
        initial = outputs[::width]  # h_0 is read on the bare prompt, the first of each request's rows
        initial = initial if initial.dtype == torch.float64 else initial.float()
        problem = cls(lm, sites, width, initial, prompts, essence, [])
        with torch.no_grad():
            before = [problem._log_probs(part, torch.zeros_like(initial)) for part in essence]
        _require_agreement(lm, batch, essence, before)
        return replace(problem, reference=before)

    def only(self, kept: Tensor) -> _Problem:
        """The facts marked in ``kept``; the others left."""
        essence = [(part, ref[kept[part.fact]]) for part, ref in zip(self.essence, self.reference, strict=True)]
        essence = [(part.only(kept), ref) for part, ref in essence if len(ref)]
        prompts = [part.only(kept) for part in self.prompts if bool(kept[part.fact].any())]
        return replace(
            self, prompts=prompts, essence=[part for part, _ in essence], reference=[ref for _, ref in essence]
        )

    def evaluate(
        self, settings: GradientSearch, delta: Tensor, norm: Tensor, factor: Tensor, *, with_grad: bool
    ) -> _Evaluation:
        """Loss (its NLL times ``factor``), parts and gradient, summed over the groups of rows."""
        nll, kl, missed = (torch.zeros_like(factor) for _ in range(3))
        grad = torch.zeros_like(delta)
        with torch.set_grad_enabled(with_grad):
            leaf = delta.requires_grad_(with_grad)
            for part in self.prompts:
                each, wrong = self._nll(part, leaf)
                missed.index_add_(0, part.fact, wrong)
                _accumulate(nll, grad, leaf, part.fact, each, factor[part.fact])
            for part, before in zip(self.essence, self.reference, strict=True):
                now = self._log_probs(part, leaf)
                divergence = (now.exp() * (now - before)).sum(1)
                _accumulate(kl, grad, leaf, part.fact, divergence, settings.kl_factor)
            length = torch.linalg.vector_norm(leaf, dim=2)
            decay = settings.weight_decay * (length / norm.square()).sum(1)
            if with_grad:
                grad += torch.autograd.grad(decay.sum(), leaf)[0]
        loss = factor * nll + settings.kl_factor * kl + decay.detach()
        return _Evaluation(loss, nll, kl, missed == 0, grad)

    def _log_probs(self, part: Suffixes, delta: Tensor) -> Float[Tensor, "read vocabulary"]:
        logits = part.logits(self.lm, self.sites, delta[part.fact])
        return logits.to(delta.dtype).log_softmax(-1)

    def _nll(self, part: Suffixes, delta: Tensor) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
        """Mean over the target's tokens, divided by the number of contexts: their sum over rows is the mean.

        Also the number of those tokens that are not the most likely ones.
        """
        logits = part.logits(self.lm, self.sites, delta[part.fact]).to(delta.dtype)
        each = torch.nn.functional.cross_entropy(logits, part.label, reduction="none")
        wrong = (logits.detach().gather(1, part.label[:, None])[:, 0] < logits.detach().amax(1)).to(each)
        count = torch.bincount(part.row, minlength=len(part.fact))
        sums = (each.new_zeros(len(part.fact)).index_add(0, part.row, value) for value in (each / self.contexts, wrong))
        nll, missed = sums
        return nll / count, missed


@torch.no_grad()
def _require_agreement(lm: LanguageModel, batch: EditBatch, essence: list[Suffixes], found: list[Tensor]) -> None:
    """Compare one suffix pass with a full one: not every attention can go on from cached keys and a mask of ours.

    Raises:
        ArchitectureError: If they differ by more than rounding.
    """
    index = max(range(len(batch)), key=lambda i: batch.essence[i].subject)
    row = batch.essence[index]
    ids = torch.tensor([row.ids[: row.subject + 1]], device=lm.device)
    full = lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1]
    (ours,) = (value[part.fact == index] for part, value in zip(essence, found, strict=True) if index in part.fact)
    difference = float((full.to(ours.dtype).log_softmax(-1) - ours[0]).abs().mean())
    if not difference <= torch.finfo(lm.dtype).eps ** (1 / 3):
        raise ArchitectureError(
            f"{type(lm.model).__name__}: a pass resumed from cached attention keys differs from a full one by "
            f"{difference:.1e} in log-probability; this attention is not supported"
        )


def _accumulate(total: Tensor, grad: Tensor, leaf: Tensor, fact: Tensor, value: Tensor, factor: Tensor | float) -> None:
    """Add a group's rows to their facts' totals and, while gradients are on, the gradient of ``factor`` times them."""
    total.index_add_(0, fact, value.detach())
    if torch.is_grad_enabled():
        grad += torch.autograd.grad((factor * value).sum(), leaf)[0]
