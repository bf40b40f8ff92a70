"""The texts from which a side memory learns an edit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from cakeflow.data import Contexts
from cakeflow.forward import Row, continuations
from cakeflow.models import LanguageModel, Scope
from cakeflow_sidememory.learning import EditRows

SEEDS = ("I", "You", "Because", "Yes", "Q: ")
"""Beginnings of the contexts, as in WISE's code."""
LENGTHS = (5, 10)
"""New tokens of each context."""
Padding = Literal["right", "left"]
"""Where short rows are filled up: on the right, where no token sees the padding and it counts in no mean; or, as WISE's
code does, on the left, where it counts, and tokens of the prompt become labels if the irrelevant text is long."""


def sampled_contexts(lm: LanguageModel, seed: int = 0) -> Contexts:
    """Sample the contexts of WISE's code: five beginnings, continued by 5 and by 10 tokens, each before ``" {}"``.

    The code samples or not, as the model's generation config says; here the five most likely tokens are drawn from.
    """
    texts: list[str] = []
    for tokens in LENGTHS:
        texts += continuations(lm, SEEDS, tokens, top_k=5, seed=seed, with_prompt=True)
    clean = [text.replace("{", " ").replace("}", " ").strip() for text in texts]
    return Contexts.of(["{}", *(f"{text} {{}}" for text in clean)])


def edit_rows(
    variants: Sequence[Row], irrelevant: Sequence[int], padding: Padding, filler: int, scope: Scope = "sequence"
) -> EditRows:
    """Return the rows of one edit.

    Distances are learned where they decide: a router that looks at a whole text learns from all of its tokens, as in
    WISE's code; one that looks at a prompt or a token from those of the prompt itself, without its context, which all
    facts have in common.

    Args:
        variants: The prompt with its target in each context, without one first.
        irrelevant: Tokens of the irrelevant text.
        padding: Where short rows are filled up.
        filler: Token of the padding.
        scope: What the router's decisions hold for.
    """
    texts = [*(row.ids for row in variants), tuple(irrelevant)]
    width = max(map(len, texts))
    left = padding == "left"
    ids = torch.tensor([_filled(text, filler, width, left) for text in texts])
    mask = torch.tensor([_filled([1] * len(text), 0, width, left) for text in texts]).bool()
    places = torch.arange(width)[None]
    if left:  # the code blanks as many positions as the longest prompt has, from the left, in every row
        labels = torch.where(places >= max(row.target for row in variants), ids, -100)
        return EditRows(ids, mask, labels, torch.ones_like(mask))
    starts = torch.tensor([*(row.target for row in variants), width])[:, None]
    labels = torch.where((places >= starts) & mask, ids, -100)
    own = mask & (places < starts) & (places >= starts - variants[0].target)
    counted = mask if scope == "sequence" else torch.cat([own[:-1], mask[-1:]])
    return EditRows(ids, mask, labels, counted)


def on(device: torch.device, rows: EditRows) -> EditRows:
    """Return the rows on a device."""
    parts: list[Tensor] = [rows.ids, rows.mask, rows.labels, rows.counted]
    return EditRows(*(each.to(device) for each in parts))


def _filled(values: Sequence[int], filler: int, width: int, left: bool) -> list[int]:
    space = [filler] * (width - len(values))
    return [*space, *values] if left else [*values, *space]
