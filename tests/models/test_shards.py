"""Weights that ranks share: read whole, written in parts, and split only where that is the same map."""

import copy

import pytest
import torch
from many_ranks import start_gloo
from rank_runs import results
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from cakeflow.errors import ArchitectureError
from cakeflow.models import Site
from cakeflow.models.hooks import capture
from cakeflow.models.shards import Skeleton, gathered, is_sharded, let_go, local, shard, whole, write
from cakeflow.storage.hashing import tensor_hash

MESH = ("data_parallel", "tensor_parallel")


def blocks_of(lm):
    return [lm.architecture.path(Site(layer)) for layer in range(lm.depth)]


def split(lm, rows, columns, plan=None, heads=(4, 4)):
    """Shard a model over a mesh of ranks, which are started."""
    start_gloo()
    shard(lm.model, blocks_of(lm), lm.model.tp_plan if plan is None else plan, heads,
          init_device_mesh("cpu", (rows, columns), mesh_dim_names=MESH))  # fmt: skip


def hashes(model):
    return {name: tensor_hash(whole(each.detach())) for name, each in model.state_dict().items()}


def test_a_plain_tensor_is_whole_and_local_and_written_in_place():
    tensor = torch.ones(2, 3)
    assert whole(tensor) is tensor
    assert local(tensor) is tensor
    write(tensor, torch.arange(6).reshape(2, 3).float())
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2), (3, 1)], ids=str)
def test_whole_weights_are_read_and_written(sizes, _models, tmp_path):  # noqa: PT019
    lm = _models["llama"]
    place, expected = lm.weight_name(Site(1, "mlp_out")), hashes(lm.model)

    def work(_):
        other = copy.deepcopy(lm)
        skeleton = Skeleton(other.model)
        split(other, *sizes, heads=(4, 2))
        assert is_sharded(other.model)
        assert hashes(other.model) == expected
        weight = other.weight(place)
        assert local(weight).numel() < weight.numel()
        changed = torch.arange(weight.numel(), dtype=weight.dtype).reshape(weight.shape)
        write(weight, changed)
        assert torch.equal(whole(weight.detach()), changed)
        assert torch.equal(other.oriented(place), changed)
        filled = skeleton.filled(other.model, keep=True)
        assert skeleton.filled(other.model, keep=False) is None
        assert not is_sharded(filled)
        assert torch.equal(filled.get_parameter(place), changed)
        assert hashes(filled) == {**expected, place: tensor_hash(changed)}
        ids = torch.arange(6)[None]
        return (filled(input_ids=ids).logits - other(input_ids=ids).logits).abs().max().item()

    assert all(each < 1e-12 for each in results(max(sizes), work, tmp_path))
    assert not is_sharded(lm.model)


def test_what_was_gathered_is_freed_also_where_a_pass_ends_within_a_block(lm, tmp_path):
    def work(_):
        split(lm, 2, 1)
        block, ids = lm.module(Site(1)), torch.arange(6)[None]
        assert isinstance(block, FSDPModule)
        with capture(lm, [Site(1, "mlp_out")], stop=True):
            lm(input_ids=ids)
        assert is_sharded(block)
        with gathered([block]):
            assert not is_sharded(block)
        assert is_sharded(block)
        block.unshard()
        let_go(lm.model)
        return is_sharded(block)

    assert results(2, work, tmp_path) == [True, True]


@pytest.mark.parametrize(
    ("plan", "heads", "words"),
    [
        ({}, (4, 4), "states no plan of tensor parallelism"),
        (
            {"model.layers.*.mlp.up_proj": "packed_colwise"},
            (4, 4),
            r"up_proj: tensor parallelism of a Linear by 'packed_",
        ),
        (None, (4, 1), "and 4, 1 attention heads cannot be dealt out to tensor_parallel_size=2"),
    ],
    ids=["none", "style", "heads"],
)
def test_what_cannot_be_split_is_left_whole(plan, heads, words, _models, tmp_path):  # noqa: PT019
    lm = _models["llama"]
    expected = hashes(lm.model)

    def work(_):
        with pytest.raises(ArchitectureError, match=words):
            split(lm, 1, 2, plan, heads)
        return not is_sharded(lm.model) and hashes(lm.model) == expected

    assert results(2, work, tmp_path) == [True, True]
