"""Tensors in the types of GGUF."""

import os
from contextlib import suppress

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from gguf.quants import dequantize

from cakeflow.errors import ExportError
from cakeflow.export.gguf_file import architecture_in, open_gguf, packed, stored


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


@pytest.fixture
def written(tmp_path):
    """A file with one tensor, and what it holds."""
    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("blk.0.ffn_down.weight", np.arange(128, dtype=np.float32).reshape(4, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "a.gguf"


def test_a_file_that_is_cut_while_it_is_open_ends_no_process(written):
    reader = open_gguf(written)
    os.truncate(written, 10)
    assert stored(reader.tensors[0]).flatten().tolist() == list(range(128))
    assert architecture_in(reader, written) == "llama"


def test_damaged_files_are_errors_of_ours(written):
    """Whatever byte is another one: read, or refused by name."""
    good = written.read_bytes()
    for place in range(len(good) - 512):
        written.write_bytes(good[:place] + b"\xa0" + good[place + 1 :])
        with suppress(ExportError):
            reader = open_gguf(written)
            architecture_in(reader, written)
            for entry in reader.tensors:
                stored(entry)
    written.write_bytes(good.replace(b"llama", b"l\xa0ama"))
    with pytest.raises(ExportError, match="names no architecture; name the file"):
        architecture_in(open_gguf(written), written)
    written.write_bytes(good.replace(b"general.architecture", b"general.architectura"))
    with pytest.raises(ExportError, match="names no architecture"):
        architecture_in(open_gguf(written), written)
