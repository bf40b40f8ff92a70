"""Projections that edits change: checked by one pass to be plain linear maps, or made such if they are quantized."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from cakeflow.errors import ArchitectureError, NumericalError, listed
from cakeflow.models.architecture import Site
from cakeflow.models.hooks import capture
from cakeflow.models.language import LanguageModel
from cakeflow.models.routing import RoutedModule

ROUNDED = 0.02
"""Largest relative difference that rounding makes: TF32 and bfloat16 stay below."""
QUANTIZED = 0.1
"""Largest relative difference that rounding of a quantized module's input makes: eight bits stay below."""
TOKENS = 8
"""Number of tokens in the pass."""


@torch.no_grad()
def check_projections(lm: LanguageModel, sites: Sequence[Site]) -> None:
    """Check that the modules at some sites are linear maps of weights of their own, in a decoder as edits need it.

    Args:
        lm: The model.
        sites: Sites of projections.

    Raises:
        ArchitectureError: If a weight cannot be edited or belongs to several modules, a module scales, rounds or adds
            to what its weight gives, blocks pass on several states for each token, a token sees later ones, or a
            memory routes texts.
        NumericalError: If the numbers that meet a projection are not finite.
    """
    for site in sites:
        _require_own(lm, site)
    if not sites:
        return
    _require_no_routes(lm)
    ids = torch.linspace(0, len(lm.embedding) - 1, TOKENS, device=lm.device).long()[None]
    blocks = [Site(layer) for layer in sorted({site.layer for site in sites})]
    with (
        capture(lm, sites, side="in") as keys,
        capture(lm, sites) as values,
        capture(lm, blocks, stop=True) as hidden,
    ):
        lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    for site in blocks:
        if hidden[site].shape != (1, TOKENS, lm.width):
            raise ArchitectureError(
                f"{lm.architecture.path(site)} passes on hidden states of shape {tuple(hidden[site].shape)} for one "
                f"text of {TOKENS} tokens, not {(1, TOKENS, lm.width)}; models with several states per token cannot be "
                "edited"
            )
    for site in sites:
        _require_linear(lm, site, keys[site], values[site])
    _require_causal(lm, ids, blocks[-1], hidden[blocks[-1]])


def _require_own(lm: LanguageModel, site: Site) -> None:
    weight = lm.weight(site)
    names = [name for name, each in lm.model.named_parameters(remove_duplicate=False) if each is weight]
    if len(names) > 1:
        raise ArchitectureError(
            f"{names[0]} is also {listed(names[1:], 3)}: an edit of one layer would change them all; such layers "
            "cannot be edited"
        )


def _require_no_routes(lm: LanguageModel) -> None:
    if paths := [path for path, module in lm.model.named_modules() if isinstance(module, RoutedModule)]:
        raise ArchitectureError(
            f"{listed(paths)}: a memory routes whole texts there, and an edit of weights measures parts of them; edit "
            "the weights first, or take the memory back (rollback)"
        )


def _require_causal(lm: LanguageModel, ids: Tensor, block: Site, hidden: Tensor) -> None:
    half = ids[:, : TOKENS // 2]
    with capture(lm, [block], stop=True) as shorter:
        lm(input_ids=half, attention_mask=torch.ones_like(half), use_cache=False)
    if not _relative(hidden[:, : TOKENS // 2], shorter[block]) <= ROUNDED:
        raise ArchitectureError(
            f"{type(lm.model).__name__}: the hidden states of a token depend on later ones; edits need a decoder, "
            "which a config with is_decoder=True may give"
        )


def _require_linear(lm: LanguageModel, site: Site, keys: Tensor, values: Tensor) -> None:
    path, module = lm.architecture.path(site), lm.module(site)
    for label, numbers in (("input", keys), ("output", values)):
        if not bool(torch.isfinite(numbers).all()):
            raise NumericalError(
                f"{path}: its {label} is not finite in {numbers.dtype}; load the model in float32 or bfloat16"
            )
    products = functional.linear(keys.double(), lm.oriented(site).to(keys.device).double())
    bias = getattr(module, "bias", None)
    difference = _relative(values, products if bias is None else products + bias.to(products))
    if not difference <= ROUNDED:
        raise ArchitectureError(
            f"{path}: {type(module).__name__} does not give its weight times its input (relative difference "
            f"{difference:.2g}): quantized, scaled or adapted; have the edited layers dequantized: dequantize=True"
        )


def _relative(values: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return float((values.double() - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))


@torch.no_grad()
def dequantize(lm: LanguageModel, sites: Sequence[Site]) -> None:
    """Put plain linear maps in the place of quantized ones; the matrix is the module's answer to unit vectors.

    Args:
        lm: The model.
        sites: Sites of projections; those that have plain weights stay as they are.

    Raises:
        ArchitectureError: If a module is no linear map.
    """
    for site in sites:
        module = lm.module(site)
        if not _is_plain(lm, site):
            lm.model.set_submodule(lm.architecture.path(site), _plain(lm, site, module))


def _is_plain(lm: LanguageModel, site: Site) -> bool:
    try:
        check_projections(lm, [site])
    except ArchitectureError:
        return False
    return True


def _plain(lm: LanguageModel, site: Site, module: nn.Module) -> nn.Linear:
    d_in, d_out = int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    eye = torch.eye(d_in, dtype=lm.dtype, device=lm.device)
    offset = module(eye[:1] * 0)
    plain = nn.Linear(d_in, d_out, device=offset.device, dtype=offset.dtype)
    plain.weight.copy_((module(eye) - offset).T)
    plain.bias.copy_(offset[0])
    if not bool(offset.any()):
        plain.register_parameter("bias", None)
    some = torch.randn(TOKENS, d_in, dtype=lm.dtype, generator=torch.Generator().manual_seed(0)).to(lm.device)
    if not _relative(module(some), plain(some)) <= QUANTIZED:
        raise ArchitectureError(f"{lm.architecture.path(site)}: {type(module).__name__} is no linear map")
    return plain.requires_grad_(False).eval()
