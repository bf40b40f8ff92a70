"""Decoys: subjects that are not edited get a share of the change, so that its row space names them as well."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.errors import ConfigError, ShapeError, require_count
from cakeflow.solvers.base import Solver
from cakeflow.solvers.least_squares import LeastSquares
from cakeflow.solvers.problem import LayerProblem, Update
from cakeflow.storage.cache import content_key


@dataclass(frozen=True)
class Decoys(Solver):
    """``inner`` with further keys, of subjects that are not edited, whose outputs move in random directions.

    The rows of a change span the keys that were written, so that whoever has it can tell the edited subjects from
    others (2602.10134, ``cakeflow.metrics.exposure``). With decoys the rows span theirs too. A decoy that is to keep
    its output has no row of its own and hides nothing, so each is to move by a part of what the facts move by on
    average, in a direction that is drawn: the price is what that does to the decoy. The paper adds decoys to the keys
    of the facts instead, so that each decoy gets a part of a fact's own residual.

    Decoys are chosen by the edit method from the facts of the batch (``core.decoys``), in the prompts of the facts, so
    that a repetition takes the same ones. Later batches do not preserve them. Facts that are undone need none.

    Attributes:
        inner: A solver.
        each: Number of decoys for each fact.
        residual: Length of a decoy's residual over the mean length of the facts'.
        names: Names to choose from; by default the subjects of the built-in facts. Those who guess should not be able
            to tell them from the edited ones by any other means.
        seed: Seed of the choice, and of the directions.

    Raises:
        ConfigError: If there is to be no decoy for a fact, or the residual is negative or not finite.
    """

    inner: Solver = field(default_factory=LeastSquares)
    each: int = 1
    residual: float = 1.0
    names: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        require_count("Decoys.each", self.each, 1)
        if not 0 <= self.residual < math.inf:
            raise ConfigError(f"Decoys.residual must be 0 or more, and finite; got {self.residual}")
        object.__setattr__(self, "names", tuple(self.names))

    def solve(self, problem: LayerProblem) -> Update:
        """Solve for the facts and the decoys together."""
        if problem.gap is None:
            return self.inner.solve(problem)
        if problem.decoys is None:
            raise ShapeError("Decoys needs keys of other subjects; the problem has none to give")
        keys = problem.decoys(self.names, self.each, self.seed).to(problem.keys)
        length = self.residual * float(problem.residual.norm(dim=1).mean())
        prompt_keys = None if problem.prompt_keys is None else torch.cat([problem.prompt_keys, keys])
        wider = replace(
            problem,
            keys=torch.cat([problem.keys, keys]),
            residual=torch.cat([problem.residual, length * self._directions(problem, len(keys))]),
            prompt_keys=prompt_keys,
            gap=torch.cat([problem.gap, torch.zeros_like(problem.gap[:1]).expand(len(keys), -1)]),
        )
        update = self.inner.solve(wider)
        extra = 0 if update.left is None else len(keys)
        numbers = update.numbers | {"decoys": float(len(keys))}
        deferred = update.deferred and replace(update.deferred, extra=extra if update.deferred.left is not None else 0)
        return replace(update, is_plain=False, extra=extra, numbers=numbers, deferred=deferred)

    def _directions(self, problem: LayerProblem, count: int) -> Float[Tensor, "m d_out"]:
        """Return unit vectors that depend on the seed, the layer and the place of the batch in its stream."""
        name = content_key("decoys", self.seed, problem.index, len(problem.history), count)
        generator = torch.Generator().manual_seed(int(name[:15], 16))
        draws = torch.randn(count, problem.residual.shape[1], generator=generator, dtype=torch.float64)
        directions: Tensor = draws / draws.norm(dim=1, keepdim=True)
        return directions.to(problem.residual)
