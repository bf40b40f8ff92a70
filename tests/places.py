"""Several devices on a machine that has one: tensors carry the name of a device, and mixing two names is an error.

What CUDA does when tensors of two devices meet, without CUDA: a ``TorchFunctionMode`` keeps a label for every tensor
that is not on the CPU, hands it on to results and views, obeys ``.to`` and ``device=``, and raises where labels differ.
The numbers are the CPU's own, so a run over several places must give the very numbers of a run on one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from cakeflow.models.language import LanguageModel

MOVES = (Tensor.to, Tensor.cpu)
FREE = (*MOVES, Tensor.copy_)


class Places(TorchFunctionMode):
    """Labels of devices, and what follows from them."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:  # a new wrapper at every access
            return torch.device(place(args[0]))
        target = None
        if func in MOVES:
            target, args, kwargs = _destination(func, args, kwargs)
        elif kwargs.get("device") is not None:
            target, kwargs["device"] = str(torch.device(kwargs["device"])), "cpu"
        given = _tensors((args, kwargs))
        places = dict.fromkeys(place(each) for each in given if each.dim())  # CUDA takes scalars from anywhere
        if len(places) > 1 and func not in FREE:
            raise RuntimeError(f"{getattr(func, '__name__', func)}: tensors on {sorted(places)}")
        here = target or next(iter(places), place(given[0]) if given else "cpu")
        result = func(*args, **kwargs)
        for each in _tensors(result):
            if each is args[0] and place(each) != here:
                result = each = each.clone()
            each.__dict__["place"] = here
        return result


def spread(lm: LanguageModel, home: str, blocks: Sequence[str]) -> None:
    """Label a model's tensors as ``device_map`` would spread them: one device per block, everything else at home."""
    names = {f"{lm.architecture.block.format(i)}.": device for i, device in enumerate(blocks)}
    for name, tensor in [*lm.model.named_parameters(), *lm.model.named_buffers()]:
        tensor.__dict__["place"] = next((device for stem, device in names.items() if name.startswith(stem)), home)
    for stem, device in names.items():
        add_hook_to_module(lm.model.get_submodule(stem[:-1]), _Mover(device, skip_keys=["past_key_values"]))
    for name, module in lm.model.named_modules():
        if not name.startswith(tuple(names)) and not list(module.children()):
            add_hook_to_module(module, _Mover(home))
    add_hook_to_module(lm.model, _Mover(home, io_same_device=True, skip_keys=["past_key_values"]))


class _Mover(AlignDevicesHook):
    """accelerate's own hook; the labels are on the weights already."""

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module


def place(tensor: Tensor) -> str:
    """The device that a tensor is said to be on."""
    return str(tensor.__dict__.get("place", "cpu"))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _destination(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str | None, tuple[Any, ...], dict[str, Any]]:
    """Where a move goes (None: nowhere), and its arguments without the device."""
    if func is Tensor.cpu:
        return "cpu", args, kwargs
    given = [*args[1:], kwargs.get("device"), kwargs.get("dtype")]
    target, dtype = None, args[0].dtype
    for each in given:
        if isinstance(each, Tensor):
            target, dtype = place(each), each.dtype
        elif isinstance(each, torch.dtype):
            dtype = each
        elif isinstance(each, (str, torch.device)):
            target = str(torch.device(each))
    return target, (args[0], dtype), {}
