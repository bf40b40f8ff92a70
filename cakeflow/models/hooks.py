"""Reading and changing what flows through a model: the only file that hooks or bypasses modules.

Every function is a context manager that leaves the model as it found it on success, error and interrupt. Blocks may
return tensors or tuples; batch comes first always; nothing is written in place. Whatever device a block lives on, what
is captured comes to the model's input device, and what is put in goes where it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cakeflow.models.architecture import Site
from cakeflow.models.language import LanguageModel


class _StopError(Exception):
    """Ends a forward pass once everything asked for has been seen."""


def _first(value: Tensor | tuple[Tensor, ...], shape: torch.Size | None) -> Tensor:
    """What flows, as rows x time x width, whether or not the block flattens it for its MLP (OPT does)."""
    tensor = value[0] if isinstance(value, tuple) else value
    return tensor if tensor.dim() == 3 or shape is None else tensor.unflatten(0, shape)


def _with_first(value: Any, tensor: Tensor) -> Any:
    """The same value with another tensor in it, in the shape that it had."""
    old = value[0] if isinstance(value, tuple) else value
    tensor = tensor.reshape(old.shape)
    return (tensor, *value[1:]) if isinstance(value, tuple) else tensor


@contextmanager
def _shapes(lm: LanguageModel, sites: Sequence[Site]) -> Iterator[dict[int, torch.Size]]:
    """Rows and time of what enters the blocks of some sites, filled as the model runs."""
    found: dict[int, torch.Size] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            found[layer] = (args[0] if args else kwargs["hidden_states"]).shape[:2]

        return hook

    with ExitStack() as stack:
        for layer in {site.layer for site in sites if site.role != "block"}:
            block = lm.module(Site(layer))
            stack.callback(block.register_forward_pre_hook(keep(layer), with_kwargs=True).remove)
        yield found


@contextmanager
def capture(
    lm: LanguageModel, sites: Sequence[Site], *, side: Literal["in", "out"] = "out", stop: bool = False
) -> Iterator[dict[Site, Float[Tensor, "rows time width"]]]:
    """Keep the input or output of modules during the forward passes in the ``with`` body.

    Args:
        lm: The model.
        sites: Where to look.
        side: The module's first input (``in``: the key of a projection) or its output.
        stop: End the forward pass, and the body, as soon as the last of ``sites`` was seen.

    Yields:
        Site -> tensor, filled as the model runs.
    """
    seen: dict[Site, Tensor] = {}

    def keep(site: Site) -> Callable[..., None]:
        def hook(_module: nn.Module, *values: Any) -> None:  # (args) before the module runs, (args, output) after
            value = _first(values[-1], shapes.get(site.layer))
            copied = side == "out" and not value.requires_grad  # Falcon adds to it in place
            seen[site] = (value.clone() if copied else value).to(lm.device)
            if stop and site == sites[-1]:
                raise _StopError

        return hook

    with ExitStack() as stack:
        shapes = stack.enter_context(_shapes(lm, sites))
        for site in sites:
            module = lm.module(site)
            register = module.register_forward_pre_hook if side == "in" else module.register_forward_hook
            stack.callback(register(keep(site)).remove)
        with suppress(_StopError):
            yield seen


@contextmanager
def _put(lm: LanguageModel, site: Site, value: Tensor, places: tuple[Tensor, Tensor], *, add: bool) -> Iterator[None]:
    """Put vectors at (rows, columns) of a module's output, in place of what is there or on top of it."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = _first(output, shapes.get(site.layer))
        there = tuple(index.to(hidden.device) for index in places)
        return _with_first(output, hidden.index_put(there, value.to(hidden), accumulate=add))

    with _shapes(lm, [site]) as shapes:
        handle = lm.module(site).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def inject(
    lm: LanguageModel, site: Site, delta: Float[Tensor, "rows width"], at: Int[Tensor, " rows"]
) -> AbstractContextManager[None]:
    """Add a vector to a module's output at one position of each row.

    Args:
        lm: The model.
        site: Whose output to change.
        delta: What to add, one vector per row; gradients flow to it.
        at: The position in each row.
    """
    return _put(lm, site, delta, (torch.arange(len(at), device=at.device), at), add=True)


def patch(
    lm: LanguageModel,
    site: Site,
    value: Float[Tensor, "places width"],
    rows: Int[Tensor, " places"],
    columns: Int[Tensor, " places"],
) -> AbstractContextManager[None]:
    """Put known vectors in place of a module's output at some positions.

    Args:
        lm: The model.
        site: Whose output to replace.
        value: What it becomes at each place.
        rows: The row of each place.
        columns: The position of each place in its row.
    """
    return _put(lm, site, value, (rows, columns), add=False)


@contextmanager
def start_at(lm: LanguageModel, layer: int, hidden: Float[Tensor, "rows time width"]) -> Iterator[None]:
    """Start forward passes at block ``layer``, with ``hidden`` as what enters it; the blocks below do nothing."""
    missing = object()
    blocks = [lm.module(Site(index)) for index in range(layer)]
    kept = [block.__dict__.get("forward", missing) for block in blocks]
    result = (hidden,) if blocks and lm.returns_tuple else hidden
    try:
        for block in blocks:
            block.forward = lambda *_args, **_kwargs: result
        yield
    finally:
        for block, forward in zip(blocks, kept, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not missing:
                block.forward = forward


@contextmanager
def logits_at(lm: LanguageModel, rows: Int[Tensor, " kept"], columns: Int[Tensor, " kept"]) -> Iterator[None]:
    """Compute logits only at the positions (row, column); they come back as 1 x kept x vocabulary."""

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        return (hidden[rows.to(hidden.device), columns.to(hidden.device)][None], *args[1:])

    handle = lm.head.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def frozen(lm: LanguageModel) -> Iterator[None]:
    """Keep no gradients for the model's own parameters, nor what they would need."""
    learning = [parameter for parameter in lm.model.parameters() if parameter.requires_grad]
    lm.model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
