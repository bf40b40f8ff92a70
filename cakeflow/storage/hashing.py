"""Hashes of files and tensors."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor


def digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            found.update(chunk)
    return found.hexdigest()


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's type, shape and bits."""
    found = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    found.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()
