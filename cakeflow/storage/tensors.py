"""Files of tensors, read whole and checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from cakeflow.errors import EditError
from cakeflow.storage.hashing import tensor_hashes


@dataclass(frozen=True, eq=False)
class TensorFile:
    """Content of a safetensors file.

    Attributes:
        tensors: The tensors by name, on the CPU.
        metadata: The texts beside them.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_tensors(
    path: Path, where: str, error: type[EditError], remedy: str, expected: str | None = None
) -> TensorFile:
    """Read a safetensors file whole, not mapped: a file that is changed later changes nothing here.

    Args:
        path: File to read.
        where: The file and who names it, for the message.
        error: Type of the error to raise.
        remedy: Advice at the end of the message.
        expected: SHA-256 that the bytes which are read must have.

    Raises:
        EditError: ``error``, if the file cannot be read, was changed or holds no tensors.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as fault:
        raise error(f"{where} is missing; {remedy}") from fault
    except OSError as fault:
        raise error(f"{where} cannot be read: {fault}; {remedy}") from fault
    if expected is not None and hashlib.sha256(data).hexdigest() != expected:
        raise error(f"{where} was changed after it was written; {remedy}")
    try:
        loaded = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, AssertionError, LookupError, TypeError, ValueError, RuntimeError) as fault:
        raise error(f"{where} holds no tensors: {fault}; {remedy}") from fault
    # Copied to where torch allocates: the last bits of a product depend on how its factors are aligned in memory.
    tensors = {name: loaded.pop(name).clone() for name in [*loaded]}
    return TensorFile(tensors, dict(header.get("__metadata__") or {}))


def fault_in(file: TensorFile, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return what is wrong with a file that was written with ``tensor_hashes`` of its tensors; empty if nothing is.

    Args:
        file: The file.
        shapes: Name -> shape of the tensors that it must have at least.
    """
    for name, shape in shapes.items():
        if name not in file.tensors or file.tensors[name].shape != shape:
            return f"no {name} of shape {shape}"
    hashes = tensor_hashes(file.tensors)
    for name, tensor in file.tensors.items():
        if hashes[name] != file.metadata.get(name):
            return f"{name} does not have the hash that was written with it"
        if not torch.isfinite(tensor).all():
            return f"{name} is not finite"
    return ""
