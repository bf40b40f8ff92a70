"""Hashes of files and tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

PIECE = 2**24
"""Bytes that are copied at a time from a device to the host."""


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            sha.update(chunk)
    return sha.hexdigest()


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's type, shape and bits."""
    sha = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    for piece in _pieces(tensor.detach().reshape(-1).contiguous().view(torch.uint8)):
        sha.update(piece.numpy().data)
    return sha.hexdigest()


def _pieces(content: Tensor) -> Iterator[Tensor]:
    """Yield the bytes of a tensor in host memory; those of a GPU through one pinned buffer, which is touched once."""
    if content.device.type != "cuda":
        yield content.cpu()
        return
    buffer = torch.empty(min(PIECE, len(content)), dtype=torch.uint8, pin_memory=True)
    for piece in content.split(PIECE):
        yield buffer[: len(piece)].copy_(piece)


def tensor_hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> ``tensor_hash`` of each tensor, as many at once as torch has threads."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return dict(zip(tensors, pool.map(tensor_hash, tensors.values()), strict=True))
