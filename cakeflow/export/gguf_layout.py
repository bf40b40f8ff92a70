"""Names and layouts of GGUF: which tensor of a file is which weight, and in which order its rows stand there."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from jaxtyping import Float
from torch import Tensor

from cakeflow.errors import ExportError
from cakeflow.models.language import LanguageModel

Layout = Callable[[Float[Tensor, "d_out ..."]], Float[Tensor, "d_out ..."]]
"""From a weight as d_out x d_in (or a bias) to the order of its rows in a file."""
PAIRED = ("llama",)
"""Architectures of GGUF in whose files the rows of queries and keys stand in pairs that are rotated together."""


def architecture_code(name: str) -> int:
    """The number of an architecture of GGUF.

    Raises:
        ExportError: If GGUF does not know it.
    """
    codes = {each: code for code, each in MODEL_ARCH_NAMES.items()}
    if name not in codes:
        raise ExportError(f"GGUF knows no architecture {name!r}; export as model, delta or lora")
    return int(codes[name])


def tensor_name(architecture: str, depth: int, name: str) -> str | None:
    """Return the name in a file of a parameter of transformers; None if there is none.

    Example:
        >>> tensor_name("llama", 2, "model.layers.1.mlp.down_proj.weight")
        'blk.1.ffn_down.weight'
    """
    names = get_tensor_name_map(architecture_code(architecture), depth)  # type: ignore[arg-type]
    result: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
    return result


def in_pairs(rows: Float[Tensor, "d_out ..."], heads: int) -> Float[Tensor, "d_out ..."]:
    """Return rows of each head with the halves that are rotated together side by side, as llama.cpp's converter does.

    Example:
        >>> in_pairs(torch.arange(8), heads=2)
        tensor([0, 2, 1, 3, 4, 6, 5, 7])
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def layout_of(lm: LanguageModel, architecture: str, name: str) -> Layout:
    """Return how llama.cpp's converter lays out a tensor of a new file.

    Args:
        lm: The model.
        architecture: Architecture of the file.
        name: The tensor's name there.
    """
    heads = _heads(lm)
    for part, count in (("attn_q", heads[0]), ("attn_k", heads[1])):
        if architecture in PAIRED and name.rpartition(".")[0].endswith(f".{part}"):
            return lambda rows: in_pairs(rows, count)
    return lambda rows: rows


def measured_layout(
    lm: LanguageModel, weight: Float[Tensor, "d_out d_in"], stored: Float[Tensor, "d_out d_in"]
) -> Layout | None:
    """Return the layout under which a file's tensor is a weight of the model; None if there is none.

    Args:
        lm: The model.
        weight: The weight in the unedited model.
        stored: The numbers in the file.
    """
    for layout in _layouts(lm):
        if stored.shape == weight.shape and torch.equal(stored.to(weight.dtype), layout(weight.cpu())):
            return layout
    return None


def _layouts(lm: LanguageModel) -> Iterator[Layout]:
    yield lambda rows: rows
    for count in _heads(lm):
        yield lambda rows, count=count: in_pairs(rows, count) if rows.shape[0] % (2 * count) == 0 else rows  # type: ignore[misc]


def _heads(lm: LanguageModel) -> tuple[int, int]:
    """Number of heads of queries and of keys."""
    heads = int(lm.config.num_attention_heads)
    return heads, int(getattr(lm.config, "num_key_value_heads", None) or heads)
