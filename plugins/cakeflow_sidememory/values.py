"""The value of a codebook's entry: the output of a projection at one token, trained until the target follows."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from math import inf

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cakeflow.errors import ConfigError, NumericalError, require_count, require_positive
from cakeflow.forward import Row
from cakeflow.models import LanguageModel, Site, capture, frozen, logits_at, patch, prompt_lengths, start_at


@dataclass(frozen=True)
class ValueTraining:
    """Settings of the training; the defaults are those of GRACE in EasyEdit.

    Attributes:
        lr: Learning rate of Adam.
        steps: Most steps.
        enough: Loss below which it ends earlier; 0 for all steps, as the code does.

    Raises:
        ConfigError: If a setting is out of its range.
    """

    lr: float = 1.0
    steps: int = 100
    enough: float = 0.0

    def __post_init__(self) -> None:
        require_count("ValueTraining.steps", self.steps, 1)
        require_positive("ValueTraining", self, "lr")
        if not self.lr < inf:
            raise ConfigError("ValueTraining.lr is infinite; set a number")
        if not 0 <= self.enough < inf:
            raise ConfigError(f"ValueTraining.enough must be at least 0, got {self.enough}")


@dataclass(frozen=True, eq=False)
class Entry:
    """The part of a codebook that a fact leaves.

    Attributes:
        key: Input of the projection at the last token of the prompt.
        value: What is to be its output there.
        label: Tokens of the target.
        losses: Mean negative log-likelihood of these tokens before each step, and at the end.
    """

    key: Float[Tensor, " d_in"]
    value: Float[Tensor, " d_out"]
    label: tuple[int, ...]
    losses: list[float] = field(default_factory=list)


@torch.enable_grad()
def learn_entry(lm: LanguageModel, site: Site, row: Row, training: ValueTraining = ValueTraining()) -> Entry:
    """Return the entry of one fact; the model stays as it is.

    The value begins as the projection's own output ("warm" in GRACE's code, whose configs begin with random numbers)
    and depends on the unedited model and the fact alone, whatever codebook stands at the site. What enters the
    projection's block is read once; each step runs that block and those above it.

    Args:
        lm: The model; below the site it must be as it was loaded.
        site: The projection.
        row: The prompt with the target.
        training: Settings.

    Raises:
        NumericalError: If the loss is not finite.
    """
    ids = torch.tensor([row.ids], device=lm.device)
    last = torch.tensor([row.target - 1], device=lm.device)
    below = [Site(site.layer - 1)] if site.layer else []
    named = prompt_lengths(lm.model, last + 1)
    with named, torch.no_grad(), capture(lm, below) as states, capture(lm, [site], side="in") as inputs:
        lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    key = inputs[site][0, row.target - 1].detach()
    value = _own_output(lm.module(site), key).requires_grad_()
    losses: list[float] = []
    adam = torch.optim.Adam([value], lr=training.lr)
    start = nullcontext() if not below else start_at(lm, site.layer, states[below[0]].detach())
    with frozen(lm), start, prompt_lengths(lm.model, last + 1):
        for _ in range(training.steps):
            loss = _loss(lm, site, row, ids, value)
            losses.append(_finite(loss, len(losses)))
            if losses[-1] < training.enough:
                break
            (value.grad,) = torch.autograd.grad(loss, [value])
            adam.step()
        else:
            with torch.no_grad():
                losses.append(_finite(_loss(lm, site, row, ids, value), len(losses)))
    return Entry(key.to(value.dtype), value.detach(), tuple(row.ids[row.target :]), losses)


@torch.no_grad()
def _own_output(module: nn.Module, key: Float[Tensor, " d_in"]) -> Float[Tensor, " d_out"]:
    """Return what a projection says, or the one behind a memory, in float32 or better."""
    base: nn.Module = getattr(module, "base", module)
    output: Tensor = base(key[None, None])[0, 0]
    return output.to(torch.promote_types(output.dtype, torch.float32), copy=True)


def _loss(lm: LanguageModel, site: Site, row: Row, ids: Tensor, value: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of the target's tokens with this value at the prompt's last token."""
    columns = torch.arange(row.target - 1, len(row.ids) - 1, device=ids.device)
    first = torch.zeros_like(columns)
    with patch(lm, site, value[None], first[:1], columns[:1]), logits_at(lm, first, columns):
        logits = lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    loss: Tensor = nn.functional.cross_entropy(wide, ids[0, row.target :])
    return loss


def _finite(loss: Tensor, step: int) -> float:
    value = float(loss.detach())
    if value != value or value == float("inf"):
        raise NumericalError(f"the loss of a value is {value} at step {step}; set lr lower")
    return value
