"""The neurons of a block that an answer may change: those that write most against, or for, its tokens (A3E)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cakeflow.errors import ArchitectureError, ConfigError, require_choice
from cakeflow.models import LanguageModel, Site

Selection = Literal["lowest", "highest", "magnitude"]
"""Neurons that an answer may change, by the score of what each writes for a token: the most negative (the official
code), the most positive (the paper's words: the most related rows), or the largest in magnitude."""


@torch.no_grad()
def neuron_scores(lm: LanguageModel, layer: int, tokens: Int[Tensor, " n"]) -> Float[Tensor, "n d_ff"]:
    """Compute what each neuron of a block writes for some tokens: ``<final norm(W_down[:, j]), head[token]>``.

    Args:
        lm: The model.
        layer: The block.
        tokens: Token ids.
    """
    down = lm.oriented(Site(layer, "mlp_out"))
    norm = lm.module(lm.architecture.final_norm) if lm.architecture.final_norm else torch.nn.Identity()
    with lm.evaluating():
        written: Tensor = norm(down.T)
    head = lm.head.get_parameter("weight").detach()
    return head[tokens.to(head.device)].to(lm.device) @ written.to(lm.device, head.dtype).T


def select_neurons(
    scores: Float[Tensor, "tokens d_ff"], share: float = 1 / 16, select: Selection = "lowest"
) -> Bool[Tensor, " d_ff"]:
    """Choose the neurons that an answer may change: for each token its share of them, all together.

    Args:
        scores: What each neuron writes for each token of the answer (``neuron_scores``).
        share: Share of the neurons for each token; equal scores are taken by index.
        select: ``lowest`` (official; most negative, not least related), ``highest`` or ``magnitude``.

    Raises:
        ConfigError: If the share is less than one neuron, or ``select`` names no selection.
    """
    require_choice("select", select, Selection)
    count = require_share(scores.shape[-1], share)
    order = {"lowest": scores, "highest": -scores, "magnitude": -scores.abs()}[select]
    chosen = order.argsort(dim=-1, stable=True)[..., :count]
    neurons = torch.zeros(scores.shape[-1], dtype=torch.bool, device=scores.device)
    neurons[chosen.flatten()] = True
    return neurons


def require_share(neurons: int, share: float) -> int:
    """Return how many neurons a share of them is.

    Raises:
        ConfigError: If it is less than one, or more than all.
    """
    count = int(neurons * share)
    if not 0 < count <= neurons:
        raise ConfigError(f"share={share} of {neurons} neurons is {count}; it must be from 1 to all of them")
    return count


def require_neurons(lm: LanguageModel, site: Site) -> None:
    """Check that a projection writes the neurons of its block.

    Raises:
        ArchitectureError: If there is none, or its outputs are not as many as the down projection's inputs.
    """
    outputs, neurons = len(lm.oriented(site)), lm.key_width(Site(site.layer, "mlp_out"))
    if outputs != neurons:
        raise ArchitectureError(
            f"{lm.architecture.path(site)} writes {outputs} numbers, and block {site.layer} has {neurons} neurons; "
            "name its up projection, such as 'mlp.up_proj'"
        )
