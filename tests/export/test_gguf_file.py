"""Tensors in the types of GGUF."""

import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from cakeflow.errors import ExportError
from cakeflow.export.gguf_file import open_gguf, packed


@pytest.mark.parametrize(
    ("kind", "bound"), [("F32", 0), ("F16", 2**-11), ("BF16", 2**-8), ("Q8_0", 2**-7), ("Q4_1", 0.1)]
)
def test_numbers_are_those_that_a_reader_gets(kind, bound):
    numbers = torch.rand(3, 64) + 0.5
    tensor = packed("w", numbers, kind)
    read = dequantize(
        np.frombuffer(tensor.data, dtype={"F32": np.float32, "F16": np.float16}.get(kind, np.uint8)).reshape(3, -1),
        tensor.kind,
    )
    assert np.array_equal(np.asarray(read, dtype=np.float32), tensor.values.numpy())
    assert float((tensor.values - numbers).abs().max()) <= bound * 1.5


@pytest.mark.parametrize(
    ("shape", "kind", "words"),
    [
        ((2, 33), "Q8_0", "w .2, 33. cannot be stored"),
        ((2, 32), "Q9", "expected exact"),
        ((2, 256), "Q4_K", "cannot be stored as Q4_K"),
    ],
)
def test_a_type_that_cannot_be_is_named(shape, kind, words):
    with pytest.raises(ExportError, match=words):
        packed("w", torch.ones(shape), kind)


def test_numbers_beyond_a_type_are_refused():
    with pytest.raises(ExportError, match="F16 cannot hold"):
        packed("w", torch.full((2, 32), 1e6), "F16")


def test_other_files_are_refused(tmp_path):
    for data in (b"", b"GGUF", b"x" * 200):
        (tmp_path / "a.gguf").write_bytes(data)
        with pytest.raises(ExportError, match="no GGUF file"):
            open_gguf(tmp_path / "a.gguf")
