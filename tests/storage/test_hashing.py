"""Hashes are those of the content, and of all of it."""

import hashlib

import pytest
import torch

from cakeflow.storage.hashing import file_hash, tensor_hash, tensor_hashes


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**20 + 5])
def test_file_hash_is_that_of_the_content(size, tmp_path):
    data = b"x" * size
    (tmp_path / "a").write_bytes(data)
    assert file_hash(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_tensor_hash_is_of_type_shape_and_bits():
    values = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    bits = b"torch.float32(2, 2)" + values.numpy().tobytes()
    assert tensor_hash(values) == hashlib.sha256(bits).hexdigest()
    others = [values.flatten(), values.double(), -values, values.T, values.view(torch.int32)]
    assert len({tensor_hash(each) for each in (values, *others)}) == 6


def test_tensor_hash_does_not_depend_on_layout_or_gradients():
    values = torch.arange(6.0).reshape(2, 3)
    assert tensor_hash(values.T.contiguous().T.requires_grad_()) == tensor_hash(values)
    assert tensor_hash(torch.cat([values, values])[2:]) == tensor_hash(values)


def test_many_tensors_have_the_hashes_of_each():
    tensors = {str(n): torch.arange(float(n)) for n in range(50)}
    hashes = tensor_hashes(tensors)
    assert list(hashes) == list(tensors)
    assert hashes == {name: tensor_hash(tensor) for name, tensor in tensors.items()}
