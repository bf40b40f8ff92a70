"""Settings of a memory as a tensor, which a stored change has beside its others."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from jaxtyping import UInt8
from torch import Tensor

from cakeflow.errors import LedgerError

S = TypeVar("S")


def encoded(settings: Any) -> UInt8[Tensor, " bytes"]:
    """Return the fields of a dataclass as the bytes of a JSON text."""
    return torch.tensor(list(json.dumps(asdict(settings), sort_keys=True).encode()), dtype=torch.uint8)


def decoded(tensor: Tensor, build: Callable[..., S]) -> S:
    """Return the settings that ``encoded`` wrote.

    Args:
        tensor: The bytes.
        build: Makes them of their fields.

    Raises:
        LedgerError: If it holds none.
    """
    try:
        return build(**json.loads(bytes(tensor.tolist())))
    except (ValueError, TypeError) as error:
        raise LedgerError(f"the settings of a side memory cannot be read: {error}") from error
