"""GGUF files as bytes: tensors are swapped, and everything else stays as it is, byte for byte."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import QuantError, dequantize, quantize
from jaxtyping import Float
from torch import Tensor

from cakeflow.errors import ExportError, visible

EXACT = {torch.float16: "F16", torch.bfloat16: "BF16"}
"""Type of a weight -> the narrowest type in a file that holds it; all others are stored as F32."""


@dataclass(frozen=True)
class Packed:
    """A tensor as a file has it.

    Attributes:
        data: Its bytes.
        kind: How they are to be read.
        values: The numbers that a reader has, float32.
    """

    data: bytes
    kind: GGMLQuantizationType
    values: Float[Tensor, ...]


def packed(name: str, tensor: Float[Tensor, ...], kind: str) -> Packed:
    """Return a tensor in a type of GGUF.

    Args:
        name: Its name, for errors.
        tensor: The numbers, in the layout of the file.
        kind: Name of the type.

    Raises:
        ExportError: If there is no such type, the ``gguf`` package cannot quantize to it, its blocks do not fit the
            rows, or numbers are too large for it.
    """
    if kind not in GGMLQuantizationType.__members__:
        raise ExportError(
            f"tensor_type = {kind!r}: expected exact, same, F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1 or Q4_0"
        )
    code, numbers = GGMLQuantizationType[kind], tensor.detach().cpu().float().contiguous().numpy()
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            data = quantize(numbers, code)
        values = torch.from_numpy(np.array(dequantize(data, code), dtype=np.float32)).reshape(tensor.shape)
    except (NotImplementedError, QuantError, ValueError) as error:
        raise ExportError(
            f"{name} {tuple(tensor.shape)} cannot be stored as {kind}: {error or 'no quantizer'}; choose another "
            "tensor_type, such as Q8_0 or exact"
        ) from error
    if not torch.isfinite(values).all():
        raise ExportError(f"{name}: numbers that {kind} cannot hold; choose tensor_type='F32'")
    return Packed(data.tobytes(), code, values)


def open_gguf(path: Path) -> GGUFReader:
    """Open a copy of a file that nobody else has: one that is cut while it is mapped would end the process (SIGBUS).

    The copy lies in the folder for temporary files (``TMPDIR``) as long as the reader lives.

    Raises:
        ExportError: If it is no GGUF file in this machine's byte order, or there is no room for the copy.
    """
    try:
        with TemporaryFile() as copy:
            with path.open("rb") as file:
                shutil.copyfileobj(file, copy, 1 << 22)
            copy.flush()
            reader = GGUFReader(copy)  # type: ignore[arg-type]  # numpy maps an open file as well
    except (OSError, ValueError, LookupError, TypeError, MemoryError) as error:
        raise ExportError(f"{path} is no GGUF file that can be read: {error}") from error
    if reader.byte_order != "I" or not reader.tensors:
        raise ExportError(f"{path} has no tensors, or another byte order; name the file that the model came from")
    return reader


def architecture_in(reader: GGUFReader, path: Path) -> str:
    """Return the name of the architecture in a file.

    Args:
        reader: The file.
        path: Its path, for errors.

    Raises:
        ExportError: If it names none.
    """
    try:
        return str(reader.fields["general.architecture"].contents())
    except (LookupError, ValueError, TypeError) as error:
        raise ExportError(f"{path} names no architecture; name the file that the model came from") from error


def stored(entry: Any) -> Float[Tensor, ...]:
    """Return the numbers of a reader's tensor, float32, in the layout of the file.

    Raises:
        ExportError: If the ``gguf`` package cannot read its type.
    """
    shape = [int(each) for each in reversed(entry.shape)]
    try:
        numbers = np.array(dequantize(entry.data, entry.tensor_type), dtype=np.float32)
        return torch.from_numpy(numbers).reshape(shape)
    except (NotImplementedError, QuantError, ValueError, RuntimeError) as error:
        raise ExportError(
            f"{visible(entry.name)} ({entry.tensor_type.name}) cannot be read: {error or 'no such quantizer'}; convert "
            "the file to Q8_0 or F16 first"
        ) from error


def write_swapped(reader: GGUFReader, path: Path, tensors: Mapping[str, Packed]) -> None:
    """Write a copy of a file with other tensors in the place of some; metadata and all others keep their bytes.

    Args:
        reader: The file.
        path: The copy.
        tensors: Name -> the tensor that takes the place of the one of this name.
    """
    blobs = {each.name: each.data.reshape(-1).view(np.uint8) for each in reader.tensors if each.name not in tensors}
    sizes = {each.name: len(tensors[each.name].data) if each.name in tensors else blobs[each.name].size
             for each in reader.tensors}  # fmt: skip
    records, offset = [], 0
    for each in reader.tensors:
        kind = tensors[each.name].kind if each.name in tensors else each.tensor_type
        records.append(b"".join(part.tobytes() for part in each.field.parts[:-2]) + struct.pack("<IQ", kind, offset))
        offset += sizes[each.name] + -sizes[each.name] % reader.alignment
    head = bytes(reader.data[: reader.tensors[0].field.offset]) + b"".join(records)
    with path.open("wb") as file:
        file.write(head + bytes(-len(head) % reader.alignment))
        for each in reader.tensors:
            file.write(tensors[each.name].data if each.name in tensors else blobs[each.name].data)
            file.write(bytes(-sizes[each.name] % reader.alignment))
