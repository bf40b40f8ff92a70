"""Files of tensors are read whole, checked, and never mapped."""

import hashlib
import json

import pytest
import torch

from cakeflow.errors import StatisticsError
from cakeflow.storage import read_tensors, write_tensors
from cakeflow.storage.hashing import tensor_hashes
from cakeflow.storage.tensors import fault_in

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(4), "empty": torch.zeros(0, 3)}


@pytest.fixture
def path(tmp_path):
    write_tensors(tmp_path / "file.safetensors", TENSORS, {"note": "x", **tensor_hashes(TENSORS)})
    return tmp_path / "file.safetensors"


def read(path):
    return read_tensors(path, f"{path.name} of mine", StatisticsError, "make it again")


def test_tensors_and_metadata_are_those_of_the_file(path):
    file = read_tensors(path, "", StatisticsError, "", hashlib.sha256(path.read_bytes()).hexdigest())
    assert file.metadata["note"] == "x"
    assert all(torch.equal(file.tensors[name], tensor) for name, tensor in TENSORS.items())
    assert fault_in(file, {"a": (2, 3), "b": ()}) == ""


def test_a_file_that_is_changed_or_cut_later_changes_nothing(path):
    file = read(path)
    with path.open("rb+") as handle:
        handle.truncate(9)
    assert torch.equal(file.tensors["a"], TENSORS["a"])
    file.tensors["a"].add_(1)


def written(header, data=b""):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return len(text).to_bytes(8, "little") + text + data


def tensor(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


FORGERIES = {
    "nothing": b"",
    "huge header": (2**63).to_bytes(8, "little") + b"{}",
    "deep header": written(b"[" * 50_000),
    "unknown type": written(tensor("X9"), bytes(4)),
    "sub-byte type": written(tensor("F4", (8,)), bytes(4)),
    "huge shape": written(tensor(shape=(2**62, 2**62)), bytes(4)),
    "negative shape": written(tensor(shape=(-1,)), bytes(4)),
    "beyond the end": written(tensor(offsets=(0, 400)), bytes(4)),
    "metadata of numbers": written({"__metadata__": {"a": 1}, **tensor()}, bytes(4)),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_files_are_named(tmp_path, name):
    path = tmp_path / "forged"
    path.write_bytes(FORGERIES[name])
    with pytest.raises(StatisticsError, match=r"forged of mine holds no tensors: .*; make it again"):
        read(path)


def test_a_file_with_another_hash_is_named(path):
    with pytest.raises(StatisticsError, match="it was changed after it was written; look"):
        read_tensors(path, "it", StatisticsError, "look", "0" * 64)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(StatisticsError, match="absent of mine is missing; make it again"):
        read(tmp_path / "absent")
    with pytest.raises(StatisticsError, match=r"of mine cannot be read: .*; make it again"):
        read(tmp_path)


def test_faults_are_named(path):
    file = read(path)
    assert fault_in(file, {"c": (1,)}) == "no c of shape (1,)"
    assert fault_in(file, {"a": (3, 2)}) == "no a of shape (3, 2)"
    file.tensors["a"][0, 0] += 1
    assert fault_in(file, {}) == "a does not have the hash that was written with it"
    endless = {"a": torch.tensor([torch.inf])}
    write_tensors(path, endless, tensor_hashes(endless))
    assert fault_in(read(path), {}) == "a is not finite"


def test_what_is_read_is_aligned_as_what_torch_allocates(tmp_path):
    """A product of tensors that lie elsewhere has other last bits, so that a repeated run would differ by chance."""
    for size in range(1, 40):
        write_tensors(tmp_path / "file", {f"{i}": torch.ones(size + i, dtype=torch.float64) for i in range(5)})
        tensors = read_tensors(tmp_path / "file", "the file", StatisticsError, "").tensors
        assert [each.data_ptr() % 64 for each in tensors.values()] == [0] * 5
