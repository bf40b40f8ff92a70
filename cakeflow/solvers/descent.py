"""Fine-tuning of one weight, within a box around it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cakeflow.errors import ConfigError, NumericalError, require_positive
from cakeflow.solvers.base import Solver
from cakeflow.solvers.problem import LayerProblem, Update


@dataclass(frozen=True)
class Descent(Solver):
    """Adam on the weight itself, on the model's loss; no entry moves further than ``bound`` (FT-L, Zhu et al. 2020).

    Keys and residual are not used, so that no target values are searched for.

    Attributes:
        steps: Largest number of steps.
        lr: Learning rate of Adam.
        bound: Largest change of an entry; None leaves it free.
        stop_loss: Mean negative log-likelihood at which the descent ends.
    """

    matrices = 6
    steps: int = 25
    lr: float = 5e-4
    bound: float | None = 5e-4
    stop_loss: float = 0.01

    @property
    def needs_targets(self) -> bool:
        """False: the loss takes the place of keys and residuals."""
        return False

    def __post_init__(self) -> None:
        require_positive("Descent", self, "steps", "lr", "bound")

    def solve(self, problem: LayerProblem) -> Update:
        """Descend the model's loss from the present weight."""
        if problem.loss is None:
            raise ConfigError("Descent needs the model's loss; the problem has none")
        change = torch.zeros_like(problem.weight, dtype=torch.float64).requires_grad_()
        adam = torch.optim.Adam([change], lr=self.lr)
        for step in range(self.steps):
            loss, change.grad = problem.loss(change.detach())
            if not loss < float("inf"):  # not a number as well
                raise NumericalError(
                    f"Descent: the loss is {loss} at step {step}; lower lr or load the model in float32"
                )
            if loss < self.stop_loss:
                break
            adam.step()
            if self.bound is not None:
                change.data.clamp_(-self.bound, self.bound)
        return Update(change.detach())
