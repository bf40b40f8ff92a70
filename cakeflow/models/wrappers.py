"""The model inside the wrappers that libraries put around one: unwrapped, or refused."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from cakeflow.errors import ArchitectureError


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """Return the model inside ``torch.compile`` and ``DataParallel``, which run the very weights that it has.

    Args:
        model: A model as transformers loads it, or a wrapper around one.

    Returns:
        The model as transformers loads it; changes of its weights are seen through the wrapper.

    Raises:
        ArchitectureError: If it is another kind of object, has adapters, or has parts that were compiled by themselves.
    """
    inner = model
    while (below := _inside(inner)) is not None:
        inner = below
    if not isinstance(inner, PreTrainedModel):
        merged = ", with its adapters merged: model.merge_and_unload()" if hasattr(inner, "merge_and_unload") else ""
        raise ArchitectureError(
            f"{type(inner).__name__} is no model of transformers, but perhaps a wrapper around one; give the model "
            f"inside it{merged}"
        )
    for name, module in inner.named_modules():
        if hasattr(module, "base_layer"):
            raise ArchitectureError(
                f"{name} has an adapter ({type(module).__name__}), which an edit beneath it would leave out of "
                "exports; merge it first: PeftModel.merge_and_unload(), or load the model without it"
            )
        if _is_compiled(module):
            raise ArchitectureError(
                f"{name or type(inner).__name__} was compiled in place, so that it may run without the hooks that "
                "edits need; give the model as it was before, or compile it as a whole: torch.compile(model)"
            )
    return inner


def _inside(model: nn.Module) -> nn.Module | None:
    """Return the model in a wrapper that shares all of its weights; None for anything else."""
    name = "module" if isinstance(model, nn.DataParallel) else "_orig_mod"
    below: nn.Module | None = getattr(model, "_modules", {}).get(name)
    return below


def _is_compiled(module: nn.Module) -> bool:
    own = vars(module)
    forward = own.get("forward")
    return own.get("_compiled_call_impl") is not None or hasattr(forward, "_torchdynamo_orig_callable")
