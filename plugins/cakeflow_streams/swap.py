"""Target values in two directions: what a state has along the one is exchanged for what it has along the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow import TargetSearch
from cakeflow.errors import ConfigError, NumericalError, require_positive
from cakeflow.forward import TextBatch
from cakeflow.models import LanguageModel, Site, frozen
from cakeflow.targets import (
    LossBelow,
    Objective,
    ObjectiveTerm,
    ObjectiveValue,
    SearchProblem,
    StopRule,
    TargetLikelihood,
    Targets,
)


@dataclass(frozen=True)
class SwapSearch(TargetSearch):
    """Adam on two unit vectors ``w_1`` and ``w_2`` for each fact, in place of the change itself (SUIT's residuals).

    The change is ``(h w_2 - h w_1) w_1 + (h w_1 - h w_2) w_2``, h the present output (SUIT, Park et al. 2026, arXiv
    2509.24502): what h has along one of them is exchanged for what it has along the other. The objective is that of the
    new target and ``penalty (w_1 w_2)^2``. With ``d = w_1 - w_2`` the change is ``-(h d) d``: where the vectors are
    orthogonal a reflection, which leaves the norm of h as it is, and never longer than four times h. So it needs
    neither a clamp nor a decay.

    Neither code nor the settings of the descent were at hand. The vectors of all facts begin at the same two random
    ones, whose coordinates are about 1, so that ``lr`` means a part of them. Facts whose keys coincide share vectors.

    Attributes:
        steps: Most evaluations of the objective.
        lr: Learning rate of Adam.
        penalty: lambda: 0.3 for all models in the paper; 0 leaves the vectors free.
        site: Module whose output gets the target.
        likelihood: Term of the new target.
        stop: Rule that ends the search of a fact; the penalty counts in the loss.
        max_tokens: Most suffix tokens in one pass with gradients.
        seed: Seed of the first vectors.
    """

    steps: int = 25
    lr: float = 0.1
    penalty: float = 0.3
    site: str = "block"
    likelihood: ObjectiveTerm = TargetLikelihood()
    stop: StopRule = LossBelow()
    max_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive("targets", self, "steps", "lr", "max_tokens")
        if not 0 <= self.penalty < math.inf:
            raise ConfigError(f"targets.penalty must be 0 or more, got {self.penalty}")

    def search(
        self,
        lm: LanguageModel,
        batch: TextBatch,
        layer: int,
        *,
        max_tokens: int | None = None,
        progress: Callable[[int], object] = lambda _: None,
        importance: Float[Tensor, " d_out"] | None = None,
    ) -> Targets:
        """Find the vectors of every fact of the batch."""
        problem = SearchProblem.prepare(lm, batch, [Site(layer, self.site)], max_tokens or self.max_tokens)
        with frozen(lm), torch.enable_grad():
            return self._descend(problem, self._objective(problem), progress)

    def measure(self, lm: LanguageModel, batch: TextBatch, layer: int, *, max_tokens: int | None = None) -> Targets:
        """Evaluate the objective without a change."""
        problem = SearchProblem.prepare(lm, batch, [Site(layer, self.site)], max_tokens or self.max_tokens)
        solved = torch.zeros(len(batch), dtype=torch.bool, device=problem.initial.device)
        value = self._objective(problem).evaluate(torch.zeros_like(problem.initial), solved, with_grad=False)
        return self._targets(problem, value, torch.ones_like(solved).long())

    @torch.no_grad()
    def _objective(self, problem: SearchProblem) -> Objective:
        return Objective({"likelihood": self.likelihood.prepare(problem)})

    def _descend(self, problem: SearchProblem, objective: Objective, progress: Callable[[int], object]) -> Targets:
        present, groups = problem.initial[:, 0], problem.batch.value_groups()
        start = torch.randn(2, present.shape[1], generator=torch.Generator().manual_seed(self.seed))
        vectors = start.to(present).expand(len(present), 2, -1).clone().requires_grad_()
        adam = torch.optim.Adam([vectors], lr=self.lr)
        active = torch.ones(len(present), dtype=torch.bool, device=present.device)
        evaluations, final = torch.zeros_like(active).long(), None
        for step in range(self.steps):
            change, overlap = swap(present, vectors[groups])
            solved = ~active if final is None else final.solved
            value = objective.evaluate(change.detach()[:, None], solved, with_grad=step < self.steps - 1)
            value = replace(value, loss=value.loss + self.penalty * overlap.detach().square())
            _require_finite(problem, value.loss, active)
            final = value if final is None else final.updated(active, value.after(final))
            evaluations += active
            done = active & (self._all_met(value, groups) | (step == self.steps - 1))
            active = active & ~done
            progress(int(done.sum()))
            if not bool(active.any()):
                break
            objective = objective.only(active)
            adam.zero_grad()
            (change * value.grad[:, 0] + self.penalty * overlap.square()[:, None] / change.shape[1]).sum().backward()
            adam.step()
        assert final is not None
        return self._targets(problem, final, evaluations)

    def _all_met(self, value: ObjectiveValue, groups: list[int]) -> Tensor:
        """Return True for facts of which all that share their vectors are done."""
        place = torch.tensor(groups, device=value.loss.device)
        open_facts = torch.zeros_like(place).index_add(0, place, (~self.stop.met(value)).long())
        return open_facts[place] == 0

    def _targets(self, problem: SearchProblem, value: ObjectiveValue, evaluations: Tensor) -> Targets:
        initial, values = problem.initial[:, 0].double(), (problem.initial + value.delta)[:, 0].double()
        probability = torch.exp(-value.terms["likelihood"])
        return Targets(values, initial, value.loss, probability, evaluations, self.stop.met(value))


def swap(
    present: Float[Tensor, "n d"], vectors: Float[Tensor, "n 2 d"]
) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
    """Return the change that exchanges what a state has along two directions, and their cosine.

    Args:
        present: The states.
        vectors: Two vectors for each, of any length.

    Example:
        >>> import torch
        >>> h = torch.tensor([[3.0, 1.0, 5.0]])
        >>> change, cosine = swap(h, torch.tensor([[[2.0, 0.0, 0.0], [0.0, 7.0, 0.0]]]))
        >>> (h + change).tolist(), cosine.tolist()
        ([[1.0, 3.0, 5.0]], [0.0])
    """
    first, second = torch.nn.functional.normalize(vectors, dim=2).unbind(1)
    along = ((second - first) * present).sum(1, keepdim=True)
    return along * (first - second), (first * second).sum(1)


def _require_finite(problem: SearchProblem, loss: Tensor, active: Tensor) -> None:
    if bool((bad := active & ~torch.isfinite(loss)).any()):
        index = int(bad.nonzero()[0, 0])
        raise NumericalError(
            f"{problem.batch.name([index])}: the loss of its target value at layer {problem.sites[0].layer} is "
            f"{float(loss[index])}; lower targets.lr or load the model in float32"
        )
