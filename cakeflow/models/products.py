"""The faster kernels of a model that runs: matrix products by oneDNN, attention without cuDNN.

For products of a frozen model in float32 torch takes MKL, which reaches less than half of oneDNN's rate on AMD's
processors (``bench_products.py``). The kernel is the one that ``torch.compile`` emits; it reads weights where they lie
and copies nothing.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cakeflow.models.shards import local

LEAST_ROWS = 8
"""Rows of inputs from which oneDNN is faster."""


@cache
def has_fast_products() -> bool:
    """True on an x86 processor that is not Intel's, if torch would take MKL there and has the kernel."""
    kernel = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return kernel and torch.backends.mkl.is_available() and "GenuineIntel" not in _processor()


def _processor() -> str:
    """Return what the system says of the processor, its vendor included."""
    description = Path("/proc/cpuinfo")
    return description.read_text() if description.exists() else platform.processor()


def product(x: Float[Tensor, "... d_in"], weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "... d_out"]:
    """Return ``x @ weight.T``, differentiable by x as often as needed, never by the weight.

    Args:
        x: Inputs, float32 on a CPU.
        weight: A weight of that type, in any layout.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _Product.apply(x, weight)  # type: ignore[no-any-return, no-untyped-call]
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")  # type: ignore[no-any-return]


def gram(rows: Float[Tensor, "n d"], parts: int = 6) -> Float[Tensor, "d d"]:
    """Return ``K^T K``; only blocks on and above the diagonal are computed, because the matrix is symmetric."""
    fast = has_fast_products() and _serves(rows)
    columns = rows.T.contiguous() if fast else rows.T
    ends = [len(columns) * (i + 1) // parts for i in range(parts)]
    result = rows.new_empty(ends[-1], ends[-1])
    for start, end in zip([0, *ends], ends, strict=False):
        above, right = columns[:end], columns[start:end]
        result[:end, start:end] = product(above, right) if fast else above @ right.T
        result[start:end, :start] = result[:start, start:end].T
    return result


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return product(x, weight)  # gradients are off in here

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return product(gradient, weight.T), None


def _serves(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == torch.float32 and tensor.is_cpu


def _forward(module: Any, x: Tensor) -> Tensor:
    """A linear map's forward pass, by its own code where the kernel does not serve."""
    weight, bias = module.weight, module.bias
    frozen = not (torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)))
    able = frozen and _serves(x) and _serves(weight) and not torch.is_autocast_enabled("cpu")
    if not (able and x.numel() >= LEAST_ROWS * x.shape[-1]):
        return cast(Tensor, type(module).forward(module, x))
    weight = weight.detach()
    output = product(x, weight.T if isinstance(module, Conv1D) else weight)
    return output if bias is None else output + bias


@contextmanager
def fast_products(model: nn.Module) -> Iterator[None]:
    """Let a model's linear maps multiply by oneDNN; a map whose forward pass was replaced keeps it."""
    changed: list[nn.Module] = []
    module: Any
    try:
        for module in model.modules() if has_fast_products() else ():
            is_own = type(module) in (nn.Linear, Conv1D) and "forward" not in module.__dict__
            if is_own and _serves(local(module.weight)):  # a sharded weight is whole while its block runs
                module.forward = partial(_forward, module)
                changed.append(module)
        yield
    finally:
        for module in changed:
            module.__dict__.pop("forward", None)


@contextmanager
def without_cudnn_attention(device: torch.device) -> Iterator[None]:
    """Attend by torch's other kernels on a GPU: cuDNN plans each new shape, and texts have many.

    Its first steps at new shapes took more than half of a search in a model of Llama-3-8B's shape
    (``bench_gpu.py --attention``).
    """
    enabled = device.type == "cuda" and torch.backends.cuda.cudnn_sdp_enabled()
    try:
        if enabled:
            torch.backends.cuda.enable_cudnn_sdp(False)
        yield
    finally:
        if enabled:
            torch.backends.cuda.enable_cudnn_sdp(True)
