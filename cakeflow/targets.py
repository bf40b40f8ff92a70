"""The value each fact should have: z, optimised for all requests of a batch at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cakeflow.architecture import Role, Site
from cakeflow.batch import EditBatch
from cakeflow.errors import ArchitectureError, ConfigError, NumericalError
from cakeflow.model import LanguageModel
from cakeflow.suffixes import Suffixes, cut


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


@dataclass(frozen=True)
class TargetOptimizer:
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
        role: Which output of the anchor layer is optimised.
        token_budget: Most suffix tokens in one forward and backward pass; bounds memory, changes no result.
    """

    steps: int = 25
    lr: float = 0.1
    clamp: float = 0.75
    kl_factor: float = 0.0625
    weight_decay: float = 0.5
    stop_loss: float = 0.05
    role: Role = "block"
    token_budget: int = 1024

    def __post_init__(self) -> None:
        for name in ("steps", "lr", "clamp", "token_budget"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"targets.{name} must be above 0, got {getattr(self, name)}")
        if self.role not in get_args(Role):
            raise ConfigError(f"targets.role must be one of {get_args(Role)}, got {self.role!r}")

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
            layer: The anchor layer.
            progress: Called after each step with the number of facts that became done.

        Returns:
            Target values at ``self.site(layer)``.

        Raises:
            NumericalError: If a loss is not finite; the message names the request.
        """
        problem = _Problem.prepare(lm, batch, self.site(layer), self.token_budget)
        frozen = [(p, p.requires_grad_(False)) for p in lm.model.parameters() if p.requires_grad]
        try:
            with torch.enable_grad():
                return self._descend(problem, batch, progress)
        finally:
            for parameter, _ in frozen:
                parameter.requires_grad_(True)

    def _descend(self, problem: _Problem, batch: EditBatch, progress: Callable[[int], object]) -> Targets:
        initial = problem.initial
        norm = torch.linalg.vector_norm(initial, dim=1)
        delta = torch.zeros_like(initial, requires_grad=True)
        adam = torch.optim.Adam([delta], lr=self.lr)
        final, loss = delta.detach().clone(), torch.zeros_like(norm)
        nll, steps = torch.zeros_like(norm), torch.zeros(len(norm), dtype=torch.long, device=norm.device)
        active = torch.ones(len(norm), dtype=torch.bool, device=norm.device)
        for step in range(self.steps):
            last = step == self.steps - 1
            now, fit, grad = problem.evaluate(self, delta.detach(), norm, with_grad=not last)
            _require_finite(now, active, batch, step)
            steps += active
            loss, nll = torch.where(active, now, loss), torch.where(active, fit, nll)
            done = active & ((now < self.stop_loss) | last)
            final[done] = delta.detach()[done]
            active = active & ~done
            progress(int(done.sum()))
            if not bool(active.any()):
                break
            problem = problem.only(active)
            delta.grad = grad
            adam.step()
            _clamp(delta, self.clamp * norm)
        return Targets(
            (initial + final).double(), initial.double(), loss, torch.exp(-nll), steps, loss < self.stop_loss
        )


def _clamp(delta: Tensor, radius: Float[Tensor, " n"]) -> None:
    """Pull every row that left its ball back onto the sphere; Adam's moments are not reset, as in the official code."""
    with torch.no_grad():
        length = torch.linalg.vector_norm(delta, dim=1)
        delta.mul_(torch.where(length > radius, radius / length, 1.0)[:, None])


def _require_finite(loss: Tensor, active: Tensor, batch: EditBatch, step: int) -> None:
    if bool((bad := active & ~torch.isfinite(loss)).any()):
        index = int(bad.nonzero()[0, 0])
        raise NumericalError(
            f"request {index} ({batch.requests[index].text!r}): the loss of its target value is {float(loss[index])} "
            f"at step {step}; lower targets.lr or load the model in float32"
        )


@dataclass(frozen=True, eq=False)
class _Problem:
    """The objective of one batch, cut down to what depends on delta."""

    lm: LanguageModel
    site: Site
    contexts: int
    initial: Float[Tensor, "n d_out"]
    prompts: list[Suffixes]
    essence: list[Suffixes]
    reference: list[Tensor]

    @classmethod
    def prepare(cls, lm: LanguageModel, batch: EditBatch, site: Site, budget: int) -> _Problem:
        rows = [row for variants in batch.rows for row in variants]
        width = len(batch.weights)
        prompts, outputs = cut(lm, rows, [i // width for i in range(len(rows))], site, budget)
        essence, _ = cut(lm, batch.essence, range(len(batch)), site, budget, read_first=True)
        initial = outputs[::width]  # h_0 is read on the bare prompt, the first of each request's rows
        initial = initial if initial.dtype == torch.float64 else initial.float()
        problem = cls(lm, site, width, initial, prompts, essence, [])
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
        self, settings: TargetOptimizer, delta: Tensor, norm: Tensor, *, with_grad: bool
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, "n d_out"]]:
        """Loss, its NLL part and the gradient, summed over the groups of rows."""
        nll, kl, grad = torch.zeros_like(norm), torch.zeros_like(norm), torch.zeros_like(delta)
        with torch.set_grad_enabled(with_grad):
            leaf = delta.requires_grad_(with_grad)
            for part in self.prompts:
                _accumulate(nll, grad, leaf, part.fact, self._nll(part, leaf))
            for part, before in zip(self.essence, self.reference, strict=True):
                now = self._log_probs(part, leaf)
                divergence = (now.exp() * (now - before)).sum(1)
                _accumulate(kl, grad, leaf, part.fact, settings.kl_factor * divergence)
            decay = settings.weight_decay * torch.linalg.vector_norm(leaf, dim=1) / norm.square()
            if with_grad:
                grad += torch.autograd.grad(decay.sum(), leaf)[0]
        return nll + kl + decay.detach(), nll, grad

    def _log_probs(self, part: Suffixes, delta: Tensor) -> Float[Tensor, "read vocabulary"]:
        logits = part.logits(self.lm, self.site, delta[part.fact])
        return logits.to(delta.dtype).log_softmax(-1)

    def _nll(self, part: Suffixes, delta: Tensor) -> Float[Tensor, " rows"]:
        """Mean over the target's tokens, divided by the number of contexts: their sum over rows is the mean."""
        logits = part.logits(self.lm, self.site, delta[part.fact]).to(delta.dtype)
        each = torch.nn.functional.cross_entropy(logits, part.label, reduction="none")
        count = torch.bincount(part.row, minlength=len(part.fact))
        return each.new_zeros(len(part.fact)).index_add(0, part.row, each) / count / self.contexts


@torch.no_grad()
def _require_agreement(lm: LanguageModel, batch: EditBatch, essence: list[Suffixes], found: list[Tensor]) -> None:
    """Compare one suffix pass with a full one: not every attention can go on from cached keys and a mask of ours.

    Raises:
        ArchitectureError: If they differ by more than rounding.
    """
    index = max(range(len(batch)), key=lambda i: batch.essence[i].subject)
    row = batch.essence[index]
    ids = torch.tensor([row.ids[: row.subject + 1]], device=lm.device)
    full = lm.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1]
    (ours,) = (value[part.fact == index] for part, value in zip(essence, found, strict=True) if index in part.fact)
    difference = float((full.to(ours.dtype).log_softmax(-1) - ours[0]).abs().mean())
    if not difference <= torch.finfo(lm.dtype).eps ** (1 / 3):
        raise ArchitectureError(
            f"{type(lm.model).__name__}: a pass resumed from cached attention keys differs from a full one by "
            f"{difference:.1e} in log-probability; this attention is not supported"
        )


def _accumulate(total: Tensor, grad: Tensor, leaf: Tensor, fact: Tensor, value: Tensor) -> None:
    """Add a group's rows to their facts' totals and, while gradients are on, its gradient to the gradient."""
    total.index_add_(0, fact, value.detach())
    if torch.is_grad_enabled():
        grad += torch.autograd.grad(value.sum(), leaf)[0]
