"""Module paths of a decoder, derived from the module tree, with a table only for exceptions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cakeflow.errors import ArchitectureError

Role = str
"""Name of a module of a block: ``block`` itself, ``mlp_out`` (down projection), ``attn_out`` (the attention's output
projection), or the path of any other module below the block, such as ``mlp.up_proj`` or ``self_attn.v_proj``."""


@dataclass(frozen=True, slots=True)
class Site:
    """One module of one block.

    Attributes:
        layer: Index of the block, from 0.
        role: Which module; the output of ``block`` is the residual stream behind it.
    """

    layer: int
    role: Role = "block"


@dataclass(frozen=True, slots=True)
class Architecture:
    """Module paths of one model; ``{}`` stands for the index of the block.

    Attributes:
        block: A decoder block.
        mlp_out: The linear map whose input is the key and whose output is the value of the MLP.
        attn_out: The output projection of the attention.
        final_norm: The norm before the head.
        head: The output embedding.

    Example:
        >>> Architecture("transformer.h.{}", "transformer.h.{}.mlp.c_proj", "transformer.h.{}.attn.c_proj",
        ...              "transformer.ln_f", "lm_head").path(Site(3, "mlp_out"))
        'transformer.h.3.mlp.c_proj'
    """

    block: str
    mlp_out: str
    attn_out: str
    final_norm: str
    head: str

    def path(self, site: Site) -> str:
        """Return the path of the module at a site."""
        template = getattr(self, site.role) if site.role in ROLES else f"{self.block}.{site.role}"
        return str(template).format(site.layer)


ROLES = ("block", "mlp_out", "attn_out")
"""Roles whose paths an ``Architecture`` names; any other role is a path below the block."""
EXCEPTIONS: dict[str, Architecture] = {}
"""``config.model_type`` -> paths, for families whose tree misleads ``find_architecture``; none so far."""


def find_architecture(model: PreTrainedModel) -> Architecture:
    """Find the blocks, projections, norm and head of a decoder from its module tree and config.

    Args:
        model: A Hugging Face causal language model.

    Returns:
        The paths; an entry in ``EXCEPTIONS`` takes precedence over the tree.

    Raises:
        ArchitectureError: If a module is missing, with a description of it and the way to pass paths by hand.
    """
    if model.config.model_type in EXCEPTIONS:
        return EXCEPTIONS[model.config.model_type]
    stack, blocks = _blocks(model)
    block, prefix = blocks[0], f"{stack}.{{}}."
    if experts := [name for name, _ in block.named_parameters() if "experts" in name.split(".")]:
        raise _missing(model, "mlp_out", f"one down projection per block; {experts[0]} belongs to a mixture of experts")
    attention = [name for name, child in block.named_children() if "attention" in type(child).__name__.lower()]
    if not attention:
        raise _missing(model, "attn_out", f"a child of {type(block).__name__} whose class name contains 'Attention'")
    attn_out = _last_projection(model, block, "attn_out", attention[0])
    norms = _names_of_norms(model, stack)
    if not norms:
        raise _missing(model, "final_norm", f"a norm beside {stack}")
    head = next((name for name, m in model.named_modules() if m is model.get_output_embeddings()), None)
    if head is None:
        raise _missing(model, "head", "model.get_output_embeddings()")
    mlp_out = _last_projection(model, block, "mlp_out", "", skip=(*attention,))
    return Architecture(f"{stack}.{{}}", prefix + mlp_out, prefix + attn_out, norms[-1], head)


def is_transposed(module: nn.Module) -> bool:
    """True if the weight is stored as d_in x d_out (GPT-2's ``Conv1D``); decided by class, never by shape."""
    return isinstance(module, Conv1D)


def _missing(model: PreTrainedModel, field: str, description: str) -> ArchitectureError:
    return ArchitectureError(
        f"{type(model).__name__} (model_type {model.config.model_type!r}): could not find {field}; looked for "
        f"{description}. Give the paths yourself: Editor.from_pretrained(..., architecture=Architecture(block=..., "
        f"mlp_out=..., attn_out=..., final_norm=..., head=...))"
    )


def _blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    depth = getattr(model.config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return name, module
    raise _missing(model, "block", f"a ModuleList with config.num_hidden_layers = {depth} entries")


def _names_of_norms(model: PreTrainedModel, stack: str) -> list[str]:
    parent = stack.rpartition(".")[0]
    children = model.get_submodule(parent).named_children()
    return [
        f"{parent}.{name}" if parent else name for name, child in children if "norm" in type(child).__name__.lower()
    ]


def linear_maps(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Return every linear map inside a module, with its path."""
    return ((name, m) for name, m in module.named_modules() if isinstance(m, (nn.Linear, Conv1D)))


def _width_out(module: nn.Module) -> int:
    weight: nn.Parameter = module.weight  # type: ignore[assignment]
    return weight.shape[1 if is_transposed(module) else 0]


def _last_projection(
    model: PreTrainedModel, block: nn.Module, field: str, child: str, skip: tuple[str, ...] = ()
) -> str:
    """Return the last linear map of ``child`` onto the residual width; modules are declared in order of use."""
    width = getattr(model.config, "hidden_size", None)
    names = [name for name, m in linear_maps(block.get_submodule(child)) if _width_out(m) == width]
    names = [f"{child}.{name}" if child else name for name in names if name.split(".")[0] not in skip]
    if not names:
        raise _missing(model, field, f"a Linear or Conv1D that writes config.hidden_size = {width} values")
    return names[-1]
