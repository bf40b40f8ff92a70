"""Settings of a memory as a tensor, which a stored change has beside its others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import UInt8
from pydantic import TypeAdapter
from torch import Tensor

from cakeflow.errors import LedgerError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

S = TypeVar("S", bound="DataclassInstance")
REMEDY = "take it from a copy, or edit again"


def encoded(settings: Any) -> UInt8[Tensor, " bytes"]:
    """Return the fields of a dataclass as the bytes of a JSON text."""
    return torch.tensor(list(json.dumps(asdict(settings), sort_keys=True).encode()), dtype=torch.uint8)


def decoded(tensor: Tensor, kind: type[S]) -> S:
    """Return the settings that ``encoded`` wrote.

    Args:
        tensor: The bytes.
        kind: Their class, whose fields have the types that are stated there.

    Raises:
        LedgerError: If it holds none.
    """
    try:
        settings = TypeAdapter(kind).validate_json(text := bytes(tensor.tolist()), strict=True)
        if json.loads(text).keys() != asdict(settings).keys():
            raise ValueError(f"a {kind.__name__} has the fields {', '.join(asdict(settings))}")
        return settings
    except (ValueError, TypeError) as error:
        raise LedgerError(f"the settings of a side memory cannot be read: {error}; {REMEDY}") from error


def numbers(place: str, tensors: Mapping[str, Tensor], **dims: int) -> list[Tensor]:
    """Return stored tensors of finite numbers.

    Args:
        place: Place of the change, for the message.
        tensors: All tensors of the change.
        dims: Name -> number of dimensions.

    Raises:
        LedgerError: If one is none of numbers, has other dimensions, or holds NaN or infinity.
    """
    parts = {name: tensors[name] for name in dims}
    for name, each in parts.items():
        if each.dim() != dims[name] or not each.is_floating_point() or not torch.isfinite(each).all():
            raise LedgerError(f"{place}: {name} are not finite numbers in {dims[name]} dimensions; {REMEDY}")
    return list(parts.values())


def counts(place: str, tensors: Mapping[str, Tensor], **dims: int) -> list[Tensor]:
    """Return stored tensors of whole numbers or truth values; arguments and errors as for ``numbers``."""
    parts = {name: tensors[name] for name in dims}
    for name, each in parts.items():
        if each.dim() != dims[name] or each.is_floating_point() or each.is_complex():
            raise LedgerError(f"{place}: {name} are not whole numbers in {dims[name]} dimensions; {REMEDY}")
    return list(parts.values())
