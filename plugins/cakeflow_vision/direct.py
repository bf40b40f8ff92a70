"""Direct effects of attention heads: what each adds to the representation through the last norm, held as it is.

A head h of block l adds ``lambda_l * (W_o[:, h] a[l, h, t])`` to the last state of token t (lambda: LayerScale), and
``gamma * (v - mean v) / sigma_t`` of that to the output of the last norm whose sigma is held, as Gandelsman et al.
(ICLR 2024) decompose representations. Blocks above the head are left out, which is what "direct" means.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cakeflow.errors import ArchitectureError
from cakeflow.models import Site, VisionModel, add_to_output, capture, frozen, read_inputs
from cakeflow_vision.heads import IMAGES, Head, representations, sites

PART = 4
"""Images whose heads are written out at once: layers x heads x tokens x width numbers each."""


def direct_scores(
    vm: VisionModel, pixels: Float[Tensor, "n 3 height width"], labels: Int[Tensor, " n"]
) -> Float[Tensor, "n layers heads"]:
    """Return each head's direct effect on the logit of the strongest rival less that of the right label.

    Args:
        vm: The model.
        pixels: n images.
        labels: Their right labels.

    Raises:
        ArchitectureError: If no layer norm lies between the blocks and the representation.
    """
    parts = zip(pixels.split(PART), labels.split(PART), strict=True)
    return torch.cat([_scores(vm, part, right) for part, right in parts])


def _scores(vm: VisionModel, pixels: Tensor, labels: Tensor) -> Float[Tensor, "n layers heads"]:
    shares = contributions(vm, pixels)
    shift = torch.zeros(len(pixels), *shares.shape[3:], dtype=vm.dtype, device=vm.device)
    with torch.enable_grad(), frozen(vm), add_to_output(vm, vm.architecture.final_norm, shift.requires_grad_()):
        logits = vm.logits(pixels)
        rows = torch.arange(len(labels), device=vm.device)
        others = logits.index_put((rows, labels), logits.new_tensor(float("-inf")))
        (gradient,) = torch.autograd.grad((others.max(1).values - logits[rows, labels]).sum(), shift)
    return torch.einsum("nlhtw,ntw->nlh", shares, gradient)


@torch.no_grad()
def without_direct_effects(
    vm: VisionModel, heads: Sequence[Head], pixels: Float[Tensor, "n 3 height width"]
) -> dict[str, Float[Tensor, "n width"]]:
    """Return the representations less the direct effects of some heads, by the path of their classifier."""
    values: dict[str, list[Tensor]] = {path: [] for path in vm.classifiers}
    layers, places = [layer for layer, _ in heads], [head for _, head in heads]
    for part in pixels.split(PART):
        shift = -contributions(vm, part)[:, layers, places].sum(1)
        with add_to_output(vm, vm.architecture.final_norm, shift):
            for path, each in representations(vm, part)[0].items():
                values[path].append(each)
    return {path: torch.cat(each) for path, each in values.items()}


@torch.no_grad()
def contributions(
    vm: VisionModel, pixels: Float[Tensor, "n 3 height width"]
) -> Float[Tensor, "n layers heads time width"]:
    """Return what each head adds to the output of the last norm, its sigma held.

    Raises:
        ArchitectureError: If no layer norm reads the states of the last block.
    """
    norm = last_norm(vm)
    with capture(vm, sites(vm), side="in") as keys, read_inputs(vm, [vm.architecture.final_norm]) as states:
        vm.logits(pixels[:IMAGES])
    state = states.get(vm.architecture.final_norm)
    if state is None or state.dim() != 3:
        raise ArchitectureError(
            f"{vm.name}: {vm.architecture.final_norm} does not read the states of all tokens, so heads have no direct "
            "effect by this definition; rank heads by the loss without them: ranking: exact"
        )
    sigma = (state.var(2, correction=0, keepdim=True) + norm.eps).sqrt()
    parts = []
    for layer, site in enumerate(sites(vm)):
        weight = vm.oriented(site).view(vm.width, vm.heads, vm.head_width)
        heads = keys[site].unflatten(2, (vm.heads, vm.head_width))
        parts.append(torch.einsum("nthc,whc->nhtw", heads, weight) * layer_scale(vm, layer))
    added = torch.stack(parts, 1)
    return norm.weight * (added - added.mean(4, keepdim=True)) / sigma[:, None, None]


def last_norm(vm: VisionModel) -> nn.LayerNorm:
    """Return the norm between the blocks and the representation.

    Raises:
        ArchitectureError: If there is none, or none whose sigma is that of a layer norm.
    """
    norm = vm.module(vm.architecture.final_norm) if vm.architecture.final_norm else None
    if not isinstance(norm, nn.LayerNorm):
        raise ArchitectureError(
            f"{vm.name} has no layer norm behind its blocks, so heads have no direct effect by this definition; rank "
            "heads by the loss without them: ranking: exact"
        )
    return norm


def layer_scale(vm: VisionModel, layer: int) -> Float[Tensor, " width"]:
    """Return the factors by which a block multiplies what its attention writes: LayerScale, else ones.

    They are the first vector of the block that belongs to no linear map and no norm.
    """
    block = vm.module(Site(layer))
    for module in block.modules():
        if not isinstance(module, (nn.Linear, nn.LayerNorm)):
            for each in module.parameters(recurse=False):
                if each.shape == (vm.width,):
                    return each.detach()
    return torch.ones(vm.width, dtype=vm.dtype, device=vm.device)
