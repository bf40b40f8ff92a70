"""The target search slot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cakeflow.forward.tokens import TextBatch
from cakeflow.models.architecture import Site
from cakeflow.models.language import LanguageModel

SEARCH_REMEDY = "lower targets.lr, targets.essence.factor or targets.decay.factor, or leave the request out"
"""What helps where a search leads away from its fact."""


def no_progress(_facts: int) -> None:
    """Ignore the number of facts that became done."""


@dataclass(frozen=True, eq=False)
class Targets:
    """Target values and the course of their search, one row per fact.

    Attributes:
        values: z, n x d_out, in float64.
        initial: Present value on the bare prompt, n x d_out, in float64.
        loss: Full objective at z.
        probability: exp(-mean negative log-likelihood) of the new target at z.
        steps: Evaluations of the objective.
        converged: True where the stop rule is met at z.
        importance: Mean over the steps made of the objective's squared gradient by the vector at the value site, 0 for
            a fact without a step; of facts with one vector the first has it, the others 0. None if it was not measured.
        away: True where the search led away from its fact, which keeps its present value; None where none can.
    """

    values: Float[Tensor, "n d_out"]
    initial: Float[Tensor, "n d_out"]
    loss: Float[Tensor, " n"]
    probability: Float[Tensor, " n"]
    steps: Int[Tensor, " n"]
    converged: Bool[Tensor, " n"]
    importance: Float[Tensor, "n d_out"] | None = None
    away: Bool[Tensor, " n"] | None = None

    @classmethod
    def join(cls, parts: Sequence[Targets], places: Sequence[Sequence[int]] | None = None) -> Targets:
        """Concatenate the targets of several parts of a batch.

        Args:
            parts: The targets.
            places: Where the facts of each part stand in the batch; by default part after part.
        """
        whole = [None if each[0] is None else torch.cat(each) for each in zip(*map(_parts, parts), strict=True)]
        if places is None:
            return cls(*whole)  # type: ignore[arg-type]
        order = torch.tensor([place for part in places for place in part]).argsort()
        return cls(*(None if each is None else each[order.to(each.device)] for each in whole))  # type: ignore[arg-type]

    def part(self, facts: Sequence[int]) -> Targets:
        """Return the targets of the facts at some places."""
        rows = torch.tensor(facts, device=self.values.device)
        return Targets(*(None if each is None else each[rows] for each in _parts(self)))  # type: ignore[arg-type]

    def to(self, device: torch.device) -> Targets:
        """Return the targets on a device."""
        return Targets(*(None if each is None else each.to(device) for each in _parts(self)))  # type: ignore[arg-type]

    def updated(self, facts: Sequence[int], newer: Targets) -> Targets:
        """Take over newer targets for the facts at some places."""
        rows, pairs = torch.tensor(facts, device=self.values.device), zip(_parts(self), _parts(newer), strict=True)
        return Targets(*(None if old is None else old.index_copy(0, rows, new) for old, new in pairs))  # type: ignore[arg-type]


def _parts(targets: Targets) -> list[Any]:
    return [getattr(targets, each.name) for each in fields(targets)]


class TargetSearch(ABC):
    """Finds the value that a module should give for each fact of a batch.

    Contract: pure (the same batch and weights give the same targets, and the model is left as it was), facts do not
    influence each other unless their keys coincide (``batch.key_groups``), ``max_tokens`` changes no result beyond
    rounding. What it is to know of earlier searches it is given (``importance``); one with ``one_by_one`` hands that on
    from fact to fact. Subclasses are frozen dataclasses. One that searches itself defines fields ``site`` and
    ``max_tokens`` with defaults; one that changes another search wraps it in a field called ``inner``, whose site and
    limit it takes over.
    """

    @property
    def _inner(self) -> TargetSearch:
        inner = getattr(self, "inner", None)
        if not isinstance(inner, TargetSearch):
            raise TypeError(f"{type(self).__name__} needs fields site and max_tokens, or a TargetSearch as inner")
        return inner

    @property
    def site(self) -> str:
        """Module whose output gets the target: a role, or a path inside the block such as ``mlp.up_proj``."""
        return self._inner.site

    @property
    def max_tokens(self) -> int:
        """Most suffix tokens in one pass with gradients."""
        return self._inner.max_tokens

    @property
    def needs_importance(self) -> bool:
        """True if ``search`` takes ``importance``; the journal keeps what it finds of it then."""
        inner = getattr(self, "inner", None)
        return isinstance(inner, TargetSearch) and inner.needs_importance

    @property
    def one_by_one(self) -> bool:
        """True if facts are searched one after the other: ``search`` gets whole batches, whatever fits into memory."""
        inner = getattr(self, "inner", None)
        return isinstance(inner, TargetSearch) and inner.one_by_one

    def value_site(self, layer: int) -> Site:
        """Return the site of the target values of a layer."""
        return Site(layer, self.site)

    def at(self, site: str) -> TargetSearch:
        """Return the same search with the target at the output of another module of the block."""
        if any(each.name == "site" for each in fields(self)):  # type: ignore[arg-type]
            return replace(self, site=site)  # type: ignore[type-var]
        return replace(self, inner=self._inner.at(site))  # type: ignore[type-var]

    @abstractmethod
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
        """Find the target values of a batch under the present weights.

        Args:
            lm: Model to search with; its weights and gradients are not touched.
            batch: n facts.
            layer: Block of the value site.
            max_tokens: Limit for this call in place of the search's own.
            progress: Callback that gets the number of facts that became done, after each step.
            importance: Sum of ``Targets.importance`` over the earlier batches; None if there are none.

        Returns:
            Target values at ``value_site(layer)``.

        Raises:
            NumericalError: If the search of a fact failed, naming the request.
        """

    @abstractmethod
    def measure(self, lm: LanguageModel, batch: TextBatch, layer: int, *, max_tokens: int | None = None) -> Targets:
        """Return the present values as targets, with the objective evaluated once, for solvers that need no targets.

        Args:
            lm: Model to measure.
            batch: n facts.
            layer: Block of the value site.
            max_tokens: Limit for this call in place of the search's own.
        """
