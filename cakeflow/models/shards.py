"""Weights that are sharded over ranks: read whole, written in parts, gathered while a block runs.

The ranks of a sharded model are in lockstep. Each of them runs every pass, and whatever reads a whole weight is done by
all of them together.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from cakeflow.errors import ArchitectureError, listed

STYLES = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
"""Way in which transformers' plans split a linear map -> torch's class for it."""
REPLICATED = ("replicate", "replicated_with_grad_allreduce")
"""Ways of theirs that leave a module whole on every rank, as it is."""


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all of its numbers: itself, or, of a sharded one, a copy that all ranks gather together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank has: all of it, unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def write(tensor: Tensor, values: Tensor) -> None:
    """Copy whole values into a tensor; of a sharded one, each rank keeps its part."""
    if isinstance(tensor, DTensor):
        values = values.to(tensor.to_local())  # no rank sends anything: all of them have the values
        values = distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
    local(tensor).copy_(values)


class Skeleton:
    """A model's modules without its weights, made before they are sharded, from which it is made whole again.

    Args:
        model: The whole model.
    """

    def __init__(self, model: nn.Module) -> None:
        empty = {id(each): nn.Parameter(each.to("meta"), each.requires_grad) for each in model.parameters()}
        self._model = copy.deepcopy(model, empty)

    def filled(self, model: nn.Module, *, keep: bool) -> nn.Module | None:
        """Return a whole model on the CPU with the weights that a sharded one has; all ranks gather them together.

        Args:
            model: The sharded model.
            keep: Whether this rank keeps it; the others get None.
        """
        weights, memo = dict(model.named_parameters()), dict[int, Any]()
        for name, empty in self._model.named_parameters():
            values = whole(weights[name].detach())
            if keep:
                memo[id(empty)] = nn.Parameter(values.cpu().clone(), empty.requires_grad)
        return copy.deepcopy(self._model, memo) if keep else None


def is_sharded(model: nn.Module) -> bool:
    """Return whether a model has weights that are sharded over ranks."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def let_go(model: nn.Module) -> None:
    """Free the weights that were gathered for a pass, also for one that was ended within a block."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def gathered(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Have whole weights in some modules while a graph of theirs is differentiated, more than once perhaps."""
    sharded = [module for module in modules if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_backward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_backward(True, recurse=False)
            module.reshard()


def shard(
    model: nn.Module, blocks: Sequence[str], plan: Mapping[str, str], heads: Sequence[int], mesh: DeviceMesh
) -> None:
    """Shard the matrices of a model's blocks over the ranks of a mesh; each has all of the rest on its device.

    Args:
        model: The model, whole and the same on every rank.
        blocks: Paths of its blocks.
        plan: Pattern of a module's path -> how tensor parallelism splits it, as transformers states it.
        heads: Numbers of attention heads, of queries and of keys, which tensor parallelism deals out.
        mesh: Two dimensions: ``data_parallel`` for FSDP2, ``tensor_parallel``.

    Raises:
        ArchitectureError: If tensor parallelism cannot split the blocks; nothing was changed.
    """
    columns, rows = mesh["tensor_parallel"], mesh["data_parallel"]
    splits = [_split(model, block, plan, heads, columns.size()) for block in blocks] if columns.size() > 1 else []
    for block, styles in zip(blocks, splits, strict=False):
        parallelize_module(model.get_submodule(block), columns, {path: STYLES[each]() for path, each in styles.items()})
    for module in map(model.get_submodule, blocks if rows.size() > 1 else ()):
        vectors = {parameter for parameter in module.parameters() if parameter.dim() < 2}
        # each block is a root by itself, because passes begin and end at any of them
        fully_shard(module, mesh=rows, reshard_after_forward=True, ignored_params=vectors)
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if not isinstance(tensor, DTensor):
                tensor.data = tensor.data.to(mesh.device_type)


def _split(model: nn.Module, block: str, plan: Mapping[str, str], heads: Sequence[int], size: int) -> dict[str, str]:
    """Return how each linear map of a block is split: path below the block -> style.

    Raises:
        ArchitectureError: If the plan has no maps for the block, or other styles, or sizes do not divide.
    """
    styles: dict[str, str] = {}
    for name, module in model.get_submodule(block).named_modules():
        style = next((each for path, each in plan.items() if fnmatchcase(f"{block}.{name}", path)), None)
        if style is None or style in REPLICATED:
            continue
        if style not in STYLES or type(module) is not nn.Linear:
            raise ArchitectureError(
                f"{block}.{name}: tensor parallelism of a {type(module).__name__} by {style!r} is not supported; shard "
                "the model by data_parallel_size instead"
            )
        if (width := module.weight.shape[style == "rowwise"]) % size or any(each % size for each in heads):
            raise ArchitectureError(
                f"{block}.{name}: {width} columns and {listed(heads)} attention heads cannot be dealt out to "
                f"tensor_parallel_size={size} ranks; choose a size that divides them, or data_parallel_size"
            )
        styles[name] = style
    if not styles:
        raise ArchitectureError(
            f"{type(model).__name__} states no plan of tensor parallelism (base_model_tp_plan) for {block}; shard the "
            "model by data_parallel_size instead"
        )
    return styles
