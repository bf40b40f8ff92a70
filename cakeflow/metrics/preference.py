"""Does the model prefer what it should? Efficacy, generalization and specificity (ROME, section 3.4), in four forms.

``probability``: the wanted continuation has the higher mean log-probability per token, strictly (CounterFact's tables).
``exact``: each of its tokens is the arg-max, teacher-forced. ``tokens``: the share of its tokens that are (zsRE's
tables). ``answer``: it is what the model says when it answers freely. Prompts are averaged per record, then records.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric

from cakeflow.errors import ConfigError
from cakeflow.evaluation.scoring import KINDS

Form = Literal["probability", "exact", "tokens", "answer"]


def success(
    form: Form,
    expected: Float[Tensor, " p"],
    rival: Float[Tensor, " p"],
    correct: Bool[Tensor, " p"],
    tokens: Float[Tensor, " p"] | None = None,
    answered: Float[Tensor, " p"] | None = None,
) -> Float[Tensor, " p"]:
    """Between 0 (a prompt fails) and 1 (it succeeds); nan where it cannot be judged (no rival, or nothing was asked).

    Raises:
        ConfigError: If what the form needs was not given.
    """
    if form == "probability":
        return torch.where(rival.isnan(), torch.nan, (expected > rival).float())
    found = {"exact": correct, "tokens": tokens, "answer": answered}[form]
    if found is None:
        raise ConfigError(f"a metric of the form {form!r} was given nothing to judge; pass every field of PromptScores")
    return found.float()


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


class Rates(Metric):
    """Mean success of records' prompts, kind by kind: what the metrics below have in common.

    Args:
        form: What counts as success.
        kwargs: Passed on to ``torchmetrics.Metric``.
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
        self.form = checked_form(form)
        self.add_state("total", torch.zeros(len(self.kinds)), dist_reduce_fx="sum")
        self.add_state("records", torch.zeros(len(self.kinds)), dist_reduce_fx="sum")

    @property
    def needs(self) -> tuple[str, ...]:
        """Fields of a record without which it cannot be judged (``cakeflow.data.fields``)."""
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
    ) -> None:
        """Take in the prompts of whole records (see ``cakeflow.scoring.PromptScores``); other kinds are passed over."""
        value = success(self.form, expected, rival, correct, tokens, answered)
        for place, name in enumerate(self.kinds):
            chosen = kind == KINDS.index(name)
            means = record_means(value[chosen], record[chosen])
            self.total[place] += means.sum()
            self.records[place] += len(means)

    def compute(self) -> Float[Tensor, ""]:
        """Mean over records, in [0, 1]; nan if no record could be judged."""
        return (self.total / self.records).mean()

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one or several values; see ``torchmetrics.Metric``."""
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
    """The same for the paraphrases of the prompt (PS).

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
