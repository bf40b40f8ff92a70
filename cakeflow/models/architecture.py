"""Module paths of a decoder, derived from the module tree, with a table only for exceptions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

from torch import nn
from torch.nn.modules.conv import _ConvNd
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
        mlp_out: The linear map whose input is the key and whose output is the value of the MLP; where every block is a
            mixture of experts, of its shared expert. Blocks of another kind do not have it.
        attn_out: The output projection of the attention, in the blocks that have one.
        final_norm: The norm before the head; empty if there is none.
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


def find_architecture(model: PreTrainedModel) -> Architecture:
    """Find the blocks, projections, norm and head of a decoder from its module tree and config.

    Blocks may differ: each path is that of the first block that has the part.

    Args:
        model: A Hugging Face causal language model, or a vision-language model, whose text part is taken.

    Returns:
        The paths.

    Raises:
        ArchitectureError: If a module is missing, with a description of it and the way to pass paths by hand.
    """
    if model.config.is_encoder_decoder:
        raise _missing(model, "block", "a decoder alone; this model has an encoder too")
    stack, blocks = _blocks(model)
    width = getattr(model.config.get_text_config(), "hidden_size", None)
    attn_out = next(filter(None, (attention_output(block, width) for block in blocks)), None)
    if attn_out is None:
        raise _missing(
            model,
            "attn_out",
            f"a child of {type(blocks[0]).__name__} whose class name contains 'Attention', and in it a linear map that "
            f"writes config.hidden_size = {width} values",
        )
    head = next((name for name, m in model.named_modules() if m is model.get_output_embeddings()), None)
    if head is None:
        raise _missing(model, "head", "model.get_output_embeddings()")
    prefix = f"{stack}.{{}}."
    mlp_out = prefix + _mlp_out_of(model, blocks, width)
    return Architecture(f"{stack}.{{}}", mlp_out, prefix + attn_out, _final_norm(model, stack, width), head)


def _mlp_out_of(model: PreTrainedModel, blocks: nn.ModuleList, width: int | None) -> str:
    dense = next(filter(None, (mlp_output(block, width) for block in blocks if not routed_experts(block))), None)
    shared = next(filter(None, (mlp_output(block, width) for block in blocks)), None)
    if dense or shared:
        return dense or shared or ""
    if experts := next(filter(None, map(routed_experts, blocks)), None):
        raise _missing(model, "mlp_out", f"an MLP or shared expert in any block; {experts} is a {MIXTURE}")
    raise _missing(
        model, "mlp_out", f"a linear map outside the attention that writes config.hidden_size = {width} values"
    )


MIXTURE = (
    "mixture of experts: the router sends every token to others of them, so that none holds a fact in all prompts, "
    "and routed experts cannot be edited"
)


def reason_for_absence(block: nn.Module, width: int) -> str:
    """Return why a block may lack a projection that others have, with a remedy; empty if nothing is known."""
    experts = routed_experts(block)
    if experts is None:
        return ""
    shared = mlp_output(block, width)
    remedy = f"edit its shared expert, site={shared!r}, or" if shared else "edit"
    return f"its {experts} is a {MIXTURE}; {remedy} layers that have a dense MLP"


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
    """Return the list of blocks that lies nearest to the input embedding; an image encoder may have as many."""
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    stacks = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not stacks:
        raise _missing(model, "block", f"a ModuleList with config.num_hidden_layers = {depth} entries")
    embedding = next((name for name, m in model.named_modules() if m is model.get_input_embeddings()), "")

    def common(path: str) -> int:
        pairs = zip(path.split("."), embedding.split("."), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    return max(stacks, key=lambda stack: common(stack[0]))  # the first of equals


def _final_norm(model: PreTrainedModel, stack: str, width: int | None) -> str:
    """Return the last norm of the residual stream beside the blocks; empty if there is none (OPT-350m)."""
    parent = stack.rpartition(".")[0]
    names = [
        name
        for name, child in model.get_submodule(parent).named_children()
        if is_norm(child) and all(weight.shape == (width,) for weight in child.parameters())
    ]
    return f"{parent}.{names[-1]}".removeprefix(".") if names else ""


def is_norm(module: nn.Module) -> bool:
    """True for a norm, by the name of its class."""
    return "norm" in type(module).__name__.lower()


def is_attention(module: nn.Module) -> bool:
    """True for an attention, by the name of its class."""
    return "attention" in type(module).__name__.lower()


def routed_experts(block: nn.Module) -> str | None:
    """Return the path of the routed experts of a block: matrices stacked in one parameter, or a list of modules."""
    modules: Iterator[tuple[str, nn.Module]] = block.named_modules()
    for name, module in modules:
        if isinstance(module, nn.ModuleList) and len(module) > 1 and all(any(linear_maps(each)) for each in module):
            return name
        stacked = any(weight.dim() == 3 and len(weight) > 1 for weight in module.parameters(recurse=False))
        if stacked and not isinstance(module, _ConvNd):
            return name
    return None


def _mixes_tokens(child: nn.Module) -> bool:
    """True for state-space and recurrent layers: they have convolutions, or matrices of their own."""
    return any(
        isinstance(module, _ConvNd)
        or (
            not isinstance(module, nn.Embedding)
            and not is_linear_map(module)
            and any(weight.dim() > 1 for weight in module.parameters(recurse=False))
        )
        for module in child.modules()
    )


def is_linear_map(module: nn.Module) -> bool:
    """True for a linear map, quantized or not: what has as many inputs and outputs as it says."""
    return isinstance(module, Conv1D) or (hasattr(module, "in_features") and hasattr(module, "out_features"))


def linear_maps(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Return every linear map inside a module, with its path."""
    return ((name, m) for name, m in module.named_modules() if is_linear_map(m))


def _widths(module: nn.Module) -> tuple[int, int]:
    """Width of a linear map's input and output."""
    if isinstance(module, Conv1D):
        d_in, d_out = module.weight.shape
        return int(d_in), int(d_out)
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def attention_output(block: nn.Module, width: int | None) -> str | None:
    """Return the last linear map of a block's first attention onto the residual width; a gate may follow it."""
    for child, module in block.named_children():
        if is_attention(module):
            names = [name for name, m in linear_maps(module) if _widths(m)[1] == width and "gate" not in name]
            return f"{child}.{names[-1]}" if names else None
    return None


def mlp_output(block: nn.Module, width: int | None) -> str | None:
    """Return the linear map of a block's MLP onto the residual width: the last of those with the widest input."""
    experts = routed_experts(block)
    maps: list[tuple[int, str]] = []
    for child, module in block.named_children():
        inside = experts is not None and f"{experts}.".startswith(f"{child}.")
        if is_attention(module) or is_norm(module) or (_mixes_tokens(module) and not inside):
            continue
        for name, each in linear_maps(module):
            path = f"{child}.{name}".rstrip(".")
            if _widths(each)[1] == width and not (inside and f"{path}.".startswith(f"{experts}.")):
                maps.append((_widths(each)[0], path))
    return max(reversed(maps), key=lambda entry: entry[0])[1] if maps else None
