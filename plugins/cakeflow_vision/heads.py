"""Attention heads behind a prediction: the loss without each of them, exact or to first order.

Our reading of RefineViT (Huang et al., NeurIPS 2025), of whose paper no equation could be read: a head's score is how
much an image's loss falls when the head is replaced, so that a positive one is harmful.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from cakeflow.models import Site, VisionModel, capture, frozen, read_inputs, replace_columns, start_at
from cakeflow_vision.recall import Recall

Replacement = Literal["zero", "mean"]
"""Value in the place of a head: nothing, or its mean over unrelated images, position by position."""
Head = tuple[int, int]
"""Block and head, from 0."""
Means = Mapping[int, Float[Tensor, "1 time d_in"]]
"""Block -> what its heads' columns are replaced by."""
ROWS = 256
"""Most rows in one forward pass."""
IMAGES = 32
"""Images in one pass; fixed, because near ties may depend on it."""


def sites(vm: VisionModel) -> list[Site]:
    """Return the output projections of all attentions."""
    return [Site(layer, "attn_out") for layer in range(vm.depth)]


def columns_of(vm: VisionModel, heads: Sequence[int]) -> Bool[Tensor, " d_in"]:
    """Return which columns of an output projection's input belong to some heads of its block."""
    columns = torch.zeros(vm.heads, vm.head_width, dtype=torch.bool, device=vm.device)
    columns[list(heads)] = True
    return columns.flatten()


@torch.no_grad()
def representations(
    vm: VisionModel, pixels: Float[Tensor, "n 3 height width"], recall: Recall | None = None
) -> tuple[dict[str, Float[Tensor, "n width"]], Float[Tensor, "n labels"]]:
    """Return what enters each classifier, by its path, and the logits: the mean of what they give for it.

    Args:
        vm: The model.
        pixels: n images.
        recall: Where representations are kept.
    """
    compute = partial(_representations, vm, pixels)
    features = recall(vm, "representations", [pixels], compute, classifiers=False) if recall is not None else compute()
    with vm.running():
        outputs = [vm.module(path)(each) for path, each in features.items()]
    return dict(features), torch.stack(outputs).mean(0)


def _representations(vm: VisionModel, pixels: Tensor) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {path: [] for path in vm.classifiers}
    for part in pixels.split(IMAGES):
        with read_inputs(vm, vm.classifiers) as features:
            vm.logits(part)
        for path, tensors in parts.items():
            tensors.append(features[path])
    return {path: torch.cat(tensors) for path, tensors in parts.items()}


@torch.no_grad()
def replacements(
    vm: VisionModel,
    replacement: Replacement,
    pixels: Float[Tensor, "n 3 height width"] | None = None,
    recall: Recall | None = None,
) -> dict[int, Float[Tensor, "1 time d_in"]]:
    """Return what takes the place of heads, block by block.

    Args:
        vm: The model.
        replacement: ``zero`` or ``mean``.
        pixels: Unrelated images, for ``mean``.
        recall: Where means are kept.
    """
    if replacement == "zero" or pixels is None:
        zero = torch.zeros(1, 1, vm.key_width(Site(0, "attn_out")), dtype=vm.dtype, device=vm.device)
        return dict.fromkeys(range(vm.depth), zero)
    compute = partial(_means, vm, pixels)
    return recall(vm, "means of heads", [pixels], compute, classifiers=False) if recall is not None else compute()


def _means(vm: VisionModel, pixels: Tensor) -> dict[int, Tensor]:
    sums: dict[int, Tensor] = {}
    for part in pixels.split(IMAGES):
        with capture(vm, sites(vm), side="in") as inputs:
            vm.logits(part)
        for site, each in inputs.items():
            sums[site.layer] = sums.get(site.layer, 0) + each.double().sum(0, keepdim=True)
    return {layer: (total / len(pixels)).to(vm.dtype) for layer, total in sums.items()}


@contextmanager
def without_heads(vm: VisionModel, heads: Sequence[Head], means: Means, rows: int) -> Iterator[None]:
    """Replace heads in the forward passes of the body.

    Args:
        vm: The model.
        heads: The heads.
        means: What takes their place.
        rows: Images in a pass.
    """
    with ExitStack() as stack:
        for layer in sorted({layer for layer, _ in heads}):
            columns = columns_of(vm, [head for each, head in heads if each == layer]).expand(rows, -1)
            stack.enter_context(replace_columns(vm, Site(layer, "attn_out"), columns, means[layer]))
        yield


def _losses(logits: Float[Tensor, "rows labels"], labels: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    return cross_entropy(logits.float(), labels, reduction="none")


@torch.no_grad()
def score_heads(
    vm: VisionModel, pixels: Float[Tensor, "n 3 height width"], labels: Int[Tensor, " n"], means: Means
) -> Float[Tensor, "n layers heads"]:
    """Return how much each image's loss falls without each head.

    The heads of a block run as one batch from the state that enters the block, which all of them share: L (L + 1) H / 2
    passes through blocks for each image, where L H whole passes would take L^2 H.

    Args:
        vm: The model.
        pixels: n images.
        labels: Their right labels.
        means: What takes the place of a head.
    """
    size = max(1, ROWS // vm.heads)
    parts = zip(pixels.split(size), labels.split(size), strict=True)
    return torch.cat([_score_part(vm, part, right, means) for part, right in parts])


def _score_part(vm: VisionModel, pixels: Tensor, labels: Tensor, means: Means) -> Float[Tensor, "n layers heads"]:
    blocks = [Site(layer) for layer in range(vm.depth)]
    with capture(vm, blocks) as states:
        whole = _losses(vm.logits(pixels), labels)
    count, scores = len(pixels), whole.new_zeros(len(pixels), vm.depth, vm.heads)
    columns = torch.stack([columns_of(vm, [head]) for head in range(vm.heads)]).repeat_interleave(count, 0)
    images, right = pixels.repeat(vm.heads, 1, 1, 1), labels.repeat(vm.heads)
    for layer in range(vm.depth):
        with ExitStack() as stack:
            if layer:
                hidden = states[Site(layer - 1)].repeat(vm.heads, 1, 1)
                stack.enter_context(start_at(vm, layer, hidden))
            stack.enter_context(replace_columns(vm, Site(layer, "attn_out"), columns, means[layer]))
            without = _losses(vm.logits(images), right)
        scores[:, layer] = whole[:, None] - without.view(vm.heads, count).T
    return scores


def first_order_scores(
    vm: VisionModel, pixels: Float[Tensor, "n 3 height width"], labels: Int[Tensor, " n"], means: Means
) -> Float[Tensor, "n layers heads"]:
    """Return the first order of ``score_heads`` in what replaces a head, from one backward pass.

    For a block's input a of its output projection and its replacement m this is the sum of ``grad * (a - m)`` over a
    head's columns and all positions.
    """
    return torch.cat(
        [
            _first_order_part(vm, part, right, means)
            for part, right in zip(pixels.split(IMAGES), labels.split(IMAGES), strict=True)
        ]
    )


def _first_order_part(vm: VisionModel, pixels: Tensor, labels: Tensor, means: Means) -> Float[Tensor, "n layers heads"]:
    with torch.enable_grad(), frozen(vm), capture(vm, sites(vm), side="in") as inputs:
        loss = _losses(vm.logits(pixels.detach().clone().requires_grad_()), labels).sum()
        gradients = torch.autograd.grad(loss, list(inputs.values()))
    products = [
        (gradient * (each - means[site.layer])).sum(1).view(len(pixels), vm.heads, vm.head_width).sum(2)
        for (site, each), gradient in zip(inputs.items(), gradients, strict=True)
    ]
    return torch.stack(products, 1).detach()


def top_heads(scores: Float[Tensor, "n layers heads"], count: int) -> list[Head]:
    """Return the heads with the highest mean score, the highest first."""
    mean = scores.mean(0)
    order = mean.flatten().argsort(descending=True, stable=True)[:count].tolist()
    return [divmod(place, mean.shape[1]) for place in order]


def agreement(scores: Float[Tensor, "n layers heads"], heads: Sequence[Head]) -> float:
    """Return the share of images whose score of these heads has the sign of the mean, averaged over the heads."""
    signs = [(scores[:, layer, head].sign() == scores[:, layer, head].mean().sign()).double() for layer, head in heads]
    return float(torch.stack(signs).mean())
