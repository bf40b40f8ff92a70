"""Guards of the target search: a rule that stops it early, and one norm for all values."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cakeflow import GradientSearch, TargetSearch
from cakeflow.errors import ConfigError, TargetNormWarning, require_positive
from cakeflow.forward import TextBatch
from cakeflow.models import LanguageModel
from cakeflow.targets import LossBelow, ObjectiveValue, StopRule, Targets

FAR = 2.0
"""Times the norm above which a change is dropped, and part of it below which a fact that becomes stronger is named."""


@dataclass(frozen=True)
class SolvedTimes(StopRule):
    """Done as well at the last of some evaluations at which the target was the most likely text (MPES in ENCORE).

    ENCORE (Gupta et al. 2025, arXiv 2502.01636) has 4 of them for GPT2-XL, 3 for Llama-2 and 2 for Llama-3. Its code
    looks at the sampled contexts only: ``TargetLikelihood(solved_in="sampled")``.

    Attributes:
        times: Number of evaluations, not necessarily in a row; None leaves the inner rule alone.
        inner: Rule that is enough by itself.
    """

    times: int | None = 2
    inner: StopRule = LossBelow()

    def __post_init__(self) -> None:
        require_positive("SolvedTimes", self, "times")

    def met(self, value: ObjectiveValue) -> Bool[Tensor, " n"]:
        """Apply the inner rule, and the number to the hits."""
        done = self.inner.met(value)
        return done if self.times is None else done | (value.hits >= self.times)


@dataclass(frozen=True)
class NormFeedback(TargetSearch):
    """One norm for what every fact has its MLP write, so that weights and values cannot drive each other up (NAS).

    With v* the output of the MLP plus the searched change, the change becomes ``norm v* / |v*|`` less the output (NAS,
    arXiv 2602.02543). Where ``|v*|`` is more than twice the norm the search has run away, and the change is dropped. A
    warning names such facts, and those whose v* was less than half of the norm: they become more than twice as strong.

    Loss and probability of the targets are those of the search, before the norm; of dropped facts, those without a
    change.

    Attributes:
        norm: rho, the norm of v*; ``typical_norm`` measures it on the unedited model.
        inner: The search, for the output of an MLP or of a block.
    """

    norm: float
    inner: TargetSearch = field(default_factory=GradientSearch)

    def __post_init__(self) -> None:
        if not 0 < self.norm < math.inf:
            raise ConfigError(
                f"NormFeedback: norm must be a number above 0, got {self.norm}; measure it by typical_norm"
            )

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
        """Search by ``inner``, and give every v* the norm."""
        options: dict[str, Any] = {"max_tokens": max_tokens, "progress": progress, "importance": importance}
        targets = self.inner.search(lm, batch, layer, **options)
        written = _Written.of(self.inner, lm, batch, layer, targets, max_tokens)
        length = written.values.norm(dim=1)
        dropped = length > FAR * self.norm
        _warn(batch, dropped, length < self.norm / FAR, self.norm)
        scaled = self.norm * torch.nn.functional.normalize(written.values)
        change = torch.where(dropped[:, None], 0.0, scaled - written.present.values)
        return _where(dropped, replace(targets, values=targets.initial + change), written.present)

    def measure(self, lm: LanguageModel, batch: TextBatch, layer: int, *, max_tokens: int | None = None) -> Targets:
        """Return the present values as ``inner`` does."""
        return self.inner.measure(lm, batch, layer, max_tokens=max_tokens)


@dataclass(frozen=True, eq=False)
class _Written:
    """What the MLP of a block writes for each fact.

    Attributes:
        present: Its present outputs, and the objective there.
        values: v*, its outputs plus the searched change.
    """

    present: Targets
    values: Float[Tensor, "n d_out"]

    @classmethod
    def of(
        cls,
        search: TargetSearch,
        lm: LanguageModel,
        batch: TextBatch,
        layer: int,
        targets: Targets,
        max_tokens: int | None = None,
    ) -> _Written:
        if search.site not in ("block", "mlp_out"):
            raise ConfigError(
                f"a norm of what the MLP writes needs a search for block or mlp_out; targets.site is {search.site!r}"
            )
        present = search.at("mlp_out").measure(lm, batch, layer, max_tokens=max_tokens)
        return cls(present, present.values + targets.values - targets.initial)


def _where(dropped: Bool[Tensor, " n"], targets: Targets, present: Targets) -> Targets:
    """Take over the present numbers of dropped facts."""
    numbers: dict[str, Any] = {
        name: torch.where(dropped, getattr(present, name), getattr(targets, name))
        for name in ("loss", "probability", "converged")
    }
    return replace(targets, **numbers)


def _warn(batch: TextBatch, dropped: Bool[Tensor, " n"], raised: Bool[Tensor, " n"], norm: float) -> None:
    for mask, outcome in ((dropped, "above twice"), (raised, "below half of")):
        if places := mask.nonzero()[:, 0].tolist():
            then = "their change is dropped" if mask is dropped else "they become more than twice as strong"
            warnings.warn(
                f"{batch.name(places)}: the norm of their value is {outcome} the norm of all, {norm:.4g}: {then}",
                TargetNormWarning,
                stacklevel=3,
            )


def typical_norm(
    search: TargetSearch, lm: LanguageModel, batch: TextBatch, layer: int, trim: float = 0.05, size: int = 100
) -> float:
    """Return the mean norm of v* over facts, to be measured on the unedited model for ``NormFeedback``.

    NAS takes 1,000 facts of CounterFact. The number depends on the model, the layer and the settings of the search.

    Args:
        search: The search, without ``NormFeedback``.
        lm: The model.
        batch: n facts.
        layer: Block of the value site: the last edited one.
        trim: Part of the norms, the largest ones, that is left out.
        size: Most facts of one search.

    Raises:
        ConfigError: If ``trim`` leaves no fact, or the search is for another site than ``block`` or ``mlp_out``.

    Example:
        >>> from cakeflow.testing import tiny_batch, tiny_model
        >>> lm = tiny_model()
        >>> search = GradientSearch(steps=2)
        >>> NormFeedback(typical_norm(search, lm, tiny_batch(lm), layer=1), search).norm > 0
        True
    """
    if not 0 <= trim < 1:
        raise ConfigError(f"typical_norm: trim must lie in [0, 1), got {trim}")
    parts = [(part, search.search(lm, part, layer)) for part in batch.split(size)]
    values = torch.cat([_Written.of(search, lm, part, layer, targets).values for part, targets in parts])
    norms = values.norm(dim=1).sort().values
    return float(norms[: len(norms) - int(trim * len(norms) + 1e-9)].mean())
