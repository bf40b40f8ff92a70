"""Efficacy, generalization and specificity (ROME, section 3.4), each in six forms.

``probability``: the right continuation has the higher mean log-probability per token, strictly (CounterFact's tables).
``exact``: each of its tokens is the arg-max, teacher-forced. ``tokens``: the share of its tokens that are (zsRE's
tables). ``answer``: the model generates it by itself. ``contained``: what it generates has it in it. ``judged``: a
judge takes what it generates as right (``cakeflow.evaluation.Judge``). Prompts are averaged per record, then records.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric

from cakeflow.errors import ConfigError, require_choice

Form = Literal["probability", "exact", "tokens", "answer", "contained", "judged"]

KINDS = ("rewrite", "paraphrase", "neighborhood")
"""Kinds of prompts that are scored; the argument ``kind`` of the metrics indexes this."""


def success(
    form: Form,
    expected: Float[Tensor, " p"],
    rival: Float[Tensor, " p"],
    correct: Bool[Tensor, " p"],
    tokens: Float[Tensor, " p"] | None = None,
    answered: Float[Tensor, " p"] | None = None,
    contained: Float[Tensor, " p"] | None = None,
    judged: Float[Tensor, " p"] | None = None,
) -> Float[Tensor, " p"]:
    """Compute the success of each prompt, from 0 to 1; nan where it cannot be judged (no rival, or no free answer).

    Raises:
        ConfigError: If the argument that the form needs is missing.
    """
    if form == "probability":
        return torch.where(rival.isnan(), torch.nan, (expected > rival).float())
    forms = {"exact": correct, "tokens": tokens, "answer": answered, "contained": contained, "judged": judged}
    value = forms[form]
    if value is None:
        raise ConfigError(f"a metric of the form {form!r} was given nothing to judge; pass every field of PromptScores")
    return value.float()


def record_means(value: Float[Tensor, " p"], record: Int[Tensor, " p"]) -> Float[Tensor, " records"]:
    """Compute the mean per record of the values that are not nan; records without any are left out.

    Example:
        >>> record_means(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 0, 1]))
        tensor([0.5000, 1.0000])
    """
    judged = ~value.isnan()
    value, record = value[judged], record[judged]
    count = torch.bincount(record)
    total = torch.zeros(len(count), device=value.device).index_add(0, record, value)
    return (total / count)[count > 0]


class Rates(Metric):
    """Mean success of records' prompts of each kind: the base of the metrics below.

    Args:
        form: Form of success, see above.
        kwargs: Arguments of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    kinds: ClassVar[tuple[str, ...]] = KINDS
    total: Tensor
    records: Tensor

    def __init__(self, form: Form = "probability", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        require_choice("form", form, Form)
        self.form = form
        self.add_state("total", torch.zeros(len(self.kinds)), dist_reduce_fx="sum")
        self.add_state("records", torch.zeros(len(self.kinds)), dist_reduce_fx="sum")

    @property
    def needs(self) -> tuple[str, ...]:
        """Fields that a record must have to be judged (``cakeflow.data.review``)."""
        return (*(name for name in self.kinds if name != "rewrite"), *["target_true"][: self.form == "probability"])

    def update(
        self,
        expected: Float[Tensor, " p"],
        rival: Float[Tensor, " p"],
        correct: Bool[Tensor, " p"],
        record: Int[Tensor, " p"],
        kind: Int[Tensor, " p"],
        tokens: Float[Tensor, " p"] | None = None,
        answered: Float[Tensor, " p"] | None = None,
        contained: Float[Tensor, " p"] | None = None,
        judged: Float[Tensor, " p"] | None = None,
    ) -> None:
        """Add the prompts of whole records (fields of ``PromptScores``); prompts of other kinds are ignored."""
        value = success(self.form, expected, rival, correct, tokens, answered, contained, judged)
        for place, name in enumerate(self.kinds):
            chosen = kind == KINDS.index(name)
            means = record_means(value[chosen], record[chosen])
            self.total[place] += means.sum()
            self.records[place] += len(means)

    def compute(self) -> Float[Tensor, ""]:
        """Return the mean over records, in [0, 1]; nan if no record could be judged."""
        return (self.total / self.records).mean()

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one or several values."""
        return self._plot(val, ax)


class Efficacy(Rates):
    """Share of edits whose own prompt gives the new target rather than the true one (ES).

    Example:
        >>> metric = Efficacy()
        >>> metric.update(torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -2.0]), torch.tensor([True, False]),
        ...               record=torch.tensor([0, 1]), kind=torch.tensor([0, 0]))
        >>> metric.compute()
        tensor(0.5000)
    """

    kinds = ("rewrite",)


class Generalization(Rates):
    """Share of edits whose paraphrased prompts give the new target rather than the true one (PS).

    Example:
        >>> metric = Generalization("tokens")  # zsRE's paraphrase accuracy
        >>> nothing, right = torch.tensor([torch.nan]), torch.tensor([False])
        >>> metric.update(nothing, nothing, right, torch.tensor([0]), torch.tensor([1]), tokens=torch.tensor([0.75]))
        >>> metric.compute()
        tensor(0.7500)
    """

    kinds = ("paraphrase",)


class Specificity(Rates):
    """Share of neighborhood prompts (other subjects, same relation) that still give their own answer (NS).

    Example:
        >>> metric = Specificity("exact")
        >>> metric.update(torch.zeros(2), torch.zeros(2), torch.tensor([True, False]),
        ...               record=torch.tensor([0, 0]), kind=torch.tensor([2, 2]))
        >>> metric.compute()
        tensor(0.5000)
    """

    kinds = ("neighborhood",)
