"""Does the model prefer what it should? Efficacy, generalization and specificity of CounterFact (ROME, section 3.4).

Protocol ``counterfact-v1``: mean log-probability per token of both targets, strict comparison; mean over the prompts
of a record first, then over records. The exact form asks whether every token of the wanted target is the arg-max.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric

from cakeflow.errors import ConfigError
from cakeflow.scoring import KINDS

Form = Literal["probability", "exact"]


def success(
    wanted: Float[Tensor, " p"], rival: Float[Tensor, " p"], correct: Bool[Tensor, " p"], form: Form
) -> Float[Tensor, " p"]:
    """1 where a prompt succeeds, 0 where it fails, nan where it cannot be judged (no rival to compare with)."""
    if form == "exact":
        return correct.float()
    return torch.where(rival.isnan(), torch.nan, (wanted > rival).float())


def checked_form(form: Form) -> Form:
    """The form, if it is one.

    Raises:
        ConfigError: Otherwise.
    """
    if form not in get_args(Form):
        raise ConfigError(f"form must be one of {get_args(Form)}, got {form!r}")
    return form


def record_means(value: Float[Tensor, " p"], record: Int[Tensor, " p"]) -> Float[Tensor, " records"]:
    """Mean per record of the entries that are not nan; records without any are left out.

    Example:
        >>> record_means(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 0, 1]))
        tensor([0.5000, 1.0000])
    """
    judged = ~value.isnan()
    value, record = value[judged], record[judged]
    count = torch.bincount(record)
    total = torch.zeros(len(count), device=value.device).index_add(0, record, value)
    return (total / count)[count > 0]


class PreferenceMetric(Metric):
    """Share of records whose prompts of one kind get the wanted target.

    Args:
        form: ``probability`` (the wanted target is more likely than its rival) or ``exact`` (it is the arg-max, token
            by token).
        kwargs: Passed on to ``torchmetrics.Metric``.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    kind: ClassVar[str]
    total: Tensor
    records: Tensor

    def __init__(self, form: Form = "probability", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.form = checked_form(form)
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("records", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(
        self,
        wanted: Float[Tensor, " p"],
        rival: Float[Tensor, " p"],
        correct: Bool[Tensor, " p"],
        record: Int[Tensor, " p"],
        kind: Int[Tensor, " p"],
    ) -> None:
        """Take in the prompts of whole records (see ``cakeflow.scoring.PromptScores``); other kinds are passed over."""
        chosen = kind == KINDS.index(self.kind)
        means = record_means(success(wanted, rival, correct, self.form)[chosen], record[chosen])
        self.total += means.sum()
        self.records += len(means)

    def compute(self) -> Float[Tensor, ""]:
        """Mean over records, in [0, 1]; nan if no record could be judged."""
        return self.total / self.records

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one or several values; see ``torchmetrics.Metric``."""
        return self._plot(val, ax)


class Efficacy(PreferenceMetric):
    """Share of edits whose own prompt gives the new target rather than the true one (ES).

    Example:
        >>> metric = Efficacy()
        >>> metric.update(torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -2.0]), torch.tensor([True, False]),
        ...               record=torch.tensor([0, 1]), kind=torch.tensor([0, 0]))
        >>> metric.compute()
        tensor(0.5000)
    """

    kind = "rewrite"


class Generalization(PreferenceMetric):
    """The same for the paraphrases of the prompt (PS)."""

    kind = "paraphrase"


class Specificity(PreferenceMetric):
    """Share of neighborhood prompts (other subjects, same relation) that still give their own answer (NS)."""

    kind = "neighborhood"
