"""Hooks that read and change hidden states: the only file that hooks or bypasses modules.

Every function is a context manager that restores the model on success, error and interrupt. Blocks may return tensors
or tuples; the first axis is the batch; nothing is written in place. Captured tensors come to the model's input device,
and tensors to insert go to the device of the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cakeflow.models.architecture import Site
from cakeflow.models.base import EditableModel
from cakeflow.models.shards import whole


class _StopError(Exception):
    """Signal that ends a forward pass after the last captured site."""


def _first(value: Tensor | tuple[Tensor, ...], shape: torch.Size | None) -> Tensor:
    """Return the hidden states as rows x time x width, also where a block flattens them for its MLP (OPT does)."""
    tensor = value[0] if isinstance(value, (tuple, list)) else value
    if tensor.dim() == 3 or shape is None:
        return tensor
    return rearrange(tensor, "(rows time) width -> rows time width", rows=shape[0])


def _with_first(value: Any, tensor: Tensor) -> Any:
    """Replace the hidden states in a module's output, in their original shape."""
    several = isinstance(value, (tuple, list))
    tensor = tensor.reshape((value[0] if several else value).shape)
    return (tensor, *value[1:]) if several else tensor


@contextmanager
def _shapes(lm: EditableModel, sites: Sequence[Site]) -> Iterator[dict[int, torch.Size]]:
    """Record rows and time of the inputs of some sites' blocks, filled as the model runs."""
    shapes: dict[int, torch.Size] = {}

    def record(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            shapes[layer] = (args[0] if args else kwargs["hidden_states"]).shape[:2]

        return hook

    with ExitStack() as stack:
        for layer in {site.layer for site in sites if site.role != "block"}:
            block = lm.module(Site(layer))
            stack.callback(block.register_forward_pre_hook(record(layer), with_kwargs=True).remove)
        yield shapes


@contextmanager
def capture(
    lm: EditableModel, sites: Sequence[Site], *, side: Literal["in", "out"] = "out", stop: bool = False
) -> Iterator[dict[Site, Float[Tensor, "rows time width"]]]:
    """Capture the input or output of modules during the forward passes in the ``with`` body.

    Args:
        lm: The model.
        sites: Sites of the modules.
        side: The module's first input (``in``: the key of a projection) or its output.
        stop: End the forward pass, and the body, right after the last of ``sites``.

    Yields:
        Site -> tensor, filled as the model runs.
    """
    tensors: dict[Site, Tensor] = {}

    def record(site: Site) -> Callable[..., None]:
        def hook(_module: nn.Module, *values: Any) -> None:  # (args) before the module runs, (args, output) after
            value = whole(_first(values[-1], shapes.get(site.layer)))  # a rank has a part of a split layer's key
            clone = side == "out" and not value.requires_grad  # Falcon adds to it in place
            tensors[site] = (value.clone() if clone else value).to(lm.device)
            if stop and site == sites[-1]:
                raise _StopError

        return hook

    with ExitStack() as stack:
        shapes = stack.enter_context(_shapes(lm, sites))
        for site in sites:
            module = lm.module(site)
            register = module.register_forward_pre_hook if side == "in" else module.register_forward_hook
            stack.callback(register(record(site)).remove)
        with suppress(_StopError):
            yield tensors


@contextmanager
def calls(lm: EditableModel, layer: int) -> Iterator[list[str]]:
    """List the modules of a block, as paths below it, in the order in which they return in the ``with`` body."""
    order: list[str] = []
    with ExitStack() as stack:
        for path, module in lm.module(Site(layer)).named_modules():
            stack.callback(module.register_forward_hook(lambda *_args, path=path: order.append(path)).remove)
        yield order


@contextmanager
def _put(lm: EditableModel, site: Site, value: Tensor, places: tuple[Tensor, Tensor], *, add: bool) -> Iterator[None]:
    """Replace a module's output at (rows, columns) by vectors, or add them to it."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = _first(output, shapes.get(site.layer))
        indices = tuple(index.to(hidden.device) for index in places)
        return _with_first(output, hidden.index_put(indices, value.to(hidden), accumulate=add))

    with _shapes(lm, [site]) as shapes:
        handle = lm.module(site).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def inject(
    lm: EditableModel,
    site: Site,
    delta: Float[Tensor, "places width"],
    at: Int[Tensor, " places"],
    rows: Int[Tensor, " places"] | None = None,
) -> AbstractContextManager[None]:
    """Add vectors to a module's output, by default at one position of each row.

    Args:
        lm: The model.
        site: Site of the module.
        delta: The vectors; gradients flow to them.
        at: Position of each in its row.
        rows: Row of each; by default each row has one.
    """
    return _put(lm, site, delta, (torch.arange(len(at), device=at.device) if rows is None else rows, at), add=True)


def patch(
    lm: EditableModel,
    site: Site,
    value: Float[Tensor, "places width"],
    rows: Int[Tensor, " places"],
    columns: Int[Tensor, " places"],
) -> AbstractContextManager[None]:
    """Replace a module's output at some positions.

    Args:
        lm: The model.
        site: Site of the module.
        value: New output at each place.
        rows: Row of each place.
        columns: Position of each place in its row.
    """
    return _put(lm, site, value, (rows, columns), add=False)


@contextmanager
def start_at(lm: EditableModel, layer: int, hidden: Float[Tensor, "rows time width"]) -> Iterator[None]:
    """Start forward passes at block ``layer`` with ``hidden`` as its input; the blocks below do nothing."""
    absent = object()
    blocks = [lm.module(Site(index)) for index in range(layer)]
    # an instance may have a forward of its own (accelerate's hooks), which deleting ours would lose
    originals = [block.__dict__.get("forward", absent) for block in blocks]
    size = lm.tuple_size if blocks else 0
    result = (hidden, *[None] * (size - 1)) if size else hidden
    try:
        for block in blocks:
            block.forward = lambda *_args, **_kwargs: result
        yield
    finally:
        for block, forward in zip(blocks, originals, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not absent:
                block.forward = forward


@contextmanager
def read_inputs(lm: EditableModel, paths: Sequence[str]) -> Iterator[dict[str, Float[Tensor, "rows width"]]]:
    """Read the first input of modules outside the blocks, such as classifiers, in the forward passes of the body.

    Args:
        lm: The model.
        paths: Paths of the modules.

    Yields:
        Path -> input of the last pass, on the model's input device.
    """
    tensors: dict[str, Tensor] = {}

    def record(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            tensors[path] = args[0].to(lm.device)

        return hook

    with ExitStack() as stack:
        for path in paths:
            stack.callback(lm.module(path).register_forward_pre_hook(record(path)).remove)
        yield tensors


@contextmanager
def add_to_output(lm: EditableModel, path: str, delta: Float[Tensor, "rows time width"]) -> Iterator[None]:
    """Add states to the output of a module outside the blocks, such as the last norm.

    Args:
        lm: The model.
        path: Path of the module.
        delta: What is added; gradients flow to it.
    """
    handle = lm.module(path).register_forward_hook(
        lambda _module, _args, output: _with_first(output, _first(output, None) + delta.to(_first(output, None)))
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replace_columns(
    lm: EditableModel, site: Site, columns: Bool[Tensor, "rows d_in"], values: Float[Tensor, "*rows time d_in"]
) -> Iterator[None]:
    """Replace some columns of a projection's input, such as those that one attention head writes.

    This removes heads under any implementation of attention; transformers 5 accepts ``head_mask`` and ignores it.

    Args:
        lm: The model.
        site: Site of the projection.
        columns: For each row the columns that are replaced.
        values: What takes their place; rows and time may have size 1.
    """

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        key = args[0]
        return (torch.where(columns[:, None].to(key.device), values.to(key), key), *args[1:])

    handle = lm.module(site).register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def outputs_of_blocks(lm: EditableModel, **inputs: Any) -> int:
    """Return the number of values that blocks return in a tuple, 0 if they return a tensor; one pass shows it."""
    sizes: list[int] = []
    handle = lm.module(Site(0)).register_forward_hook(
        lambda _m, _a, out: sizes.append(len(out) if isinstance(out, (tuple, list)) else 0)
    )
    try:
        with torch.no_grad():
            lm(**inputs)
    finally:
        handle.remove()
    return sizes[0]


@contextmanager
def logits_at(lm: EditableModel, rows: Int[Tensor, " read"], columns: Int[Tensor, " read"]) -> Iterator[None]:
    """Compute logits only at the positions (row, column), in the shape 1 x read x vocabulary."""

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        return (hidden[rows.to(hidden.device), columns.to(hidden.device)][None], *args[1:])

    handle = lm.module(lm.architecture.head).register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def frozen(lm: EditableModel) -> Iterator[None]:
    """Turn off gradients of the model's own parameters, which saves the activations that they need."""
    trainable = [parameter for parameter in lm.model.parameters() if parameter.requires_grad]
    lm.model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
