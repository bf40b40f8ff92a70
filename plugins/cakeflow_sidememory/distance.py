"""Distances between the answers of a side memory and those of the projection beside it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.activations import ACT2FN

from cakeflow.errors import ArchitectureError
from cakeflow.models import LanguageModel

Activation = Callable[[Tensor], Tensor]
"""A function of each entry, such as SiLU."""


def activation_name(lm: LanguageModel) -> str:
    """Return the name of the activation of a model's MLPs.

    Raises:
        ArchitectureError: If its config names none.
    """
    names = (getattr(lm.config, name, None) for name in ("hidden_act", "activation_function", "hidden_activation"))
    name = next((name for name in names if isinstance(name, str)), None)
    if name is None:
        raise ArchitectureError(f"the config of {lm.name} names no activation of its MLPs; name one: activation=silu")
    return name


def activation_of(name: str) -> Activation:
    """Return an activation by the name that a model's config has.

    Raises:
        ArchitectureError: If there is none of that name.
    """
    if name not in ACT2FN:
        raise ArchitectureError(f"activation={name!r} is none that transformers knows; name another, such as silu")
    function: nn.Module = ACT2FN[name]
    return function


def token_distances(
    side: Float[Tensor, "*tokens d_out"], main: Float[Tensor, "*tokens d_out"], activation: Activation
) -> Float[Tensor, " *tokens"]:
    """Return the norm of the difference of two answers after the activation, token by token.

    WISE's code, ``euc``; its paper (Wang et al. 2024, arXiv 2405.14768, Eq. 3) has the answers without activation. The
    gradient is 0 where both are equal.
    """
    distance: Tensor = (activation(side) - activation(main)).norm(dim=-1)
    return distance


def row_distances(
    distances: Float[Tensor, "rows time"], counted: Bool[Tensor, "rows time"], longest: int | None = None
) -> Float[Tensor, " rows"]:
    """Return the mean of each row's distances over its counted tokens.

    Args:
        distances: Distance of each token.
        counted: True at the tokens that count; a row without any has the distance 0.
        longest: Where a row has more tokens than this, its largest distance is taken, as WISE's code does beyond 100.
    """
    total = (distances * counted).sum(1)
    mean = total / counted.sum(1).clamp_min(1)
    if longest is None:
        return mean
    return torch.where(counted.sum(1) > longest, (distances * counted).amax(1), mean)
