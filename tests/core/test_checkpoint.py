"""Checkpoints that hold numbers and text and nothing else."""

import json
import pickletools
import zipfile
from collections import OrderedDict

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from safetensors import safe_open
from safetensors.torch import save_file

from cakeflow import Contexts, EditDataModule, GradientSearch, LocateThenEdit
from cakeflow.core.checkpoint import FORMAT, SafeCheckpointIO, with_safe_checkpoints
from cakeflow.errors import ConfigError, RunFolderError
from cakeflow.models.architecture import Site

IO = SafeCheckpointIO()
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
TREES = st.dictionaries(
    st.text() | st.integers(),
    st.recursive(
        PLAIN,
        lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
        max_leaves=12,
    ),
)


@given(TREES)
def test_plain_trees_come_back_equal(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("trees") / "a.ckpt"
    IO.save_checkpoint(tree, path)
    result = IO.load_checkpoint(path)
    assert result == tree
    assert repr(result) == repr(tree)  # True is not 1, and a tuple no list


def test_tensors_come_back_bit_for_bit_even_shared_ones(tmp_path):
    weight = torch.randn(3, 4)
    tree = {
        "state_dict": OrderedDict(a=weight.T, b=weight, c=weight[0]),
        "states": [(torch.arange(3), {0: torch.tensor(2.5, dtype=torch.bfloat16)})],
    }
    IO.save_checkpoint(tree, tmp_path / "deep" / "a.ckpt")
    result = IO.load_checkpoint(tmp_path / "deep" / "a.ckpt", map_location=torch.device("cpu"))
    assert torch.equal(result["state_dict"]["a"], weight.T)
    assert torch.equal(result["state_dict"]["b"], weight)
    assert torch.equal(result["state_dict"]["c"], weight[0])
    numbers, states = result["states"][0]
    assert torch.equal(numbers, torch.arange(3))
    assert states[0].dtype == torch.bfloat16
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.ckpt"]
    IO.remove_checkpoint(tmp_path / "deep" / "a.ckpt")
    IO.remove_checkpoint(tmp_path / "deep" / "a.ckpt")
    assert not list((tmp_path / "deep").iterdir())


@pytest.mark.parametrize(
    ("tree", "place"),
    [
        ({"a": [1, {"b": {1, 2}}]}, r"checkpoint\['a'\]\[1\]\['b'\] is a set"),
        ({"f": print}, r"checkpoint\['f'\] is a builtin_function_or_method"),
        ({"c": {1.5: 2}}, r"checkpoint\['c'\] has the key 1.5"),
    ],
)
def test_other_values_are_refused_by_place_and_nothing_is_written(tmp_path, tree, place):
    with pytest.raises(ConfigError, match=place):
        IO.save_checkpoint(tree, tmp_path / "a.ckpt")
    assert not list(tmp_path.iterdir())


def test_files_that_are_none_of_ours(tmp_path):
    IO.save_checkpoint({"a": torch.ones(100)}, tmp_path / "good.ckpt")
    bad = {name: tmp_path / f"{name}.ckpt" for name in ("cut", "torch", "text", "missing", "empty")}
    bad["cut"].write_bytes((tmp_path / "good.ckpt").read_bytes()[:-40])
    torch.save({"a": 1}, bad["torch"])
    bad["text"].write_text("state_dict: 1")
    bad["empty"].touch()
    for path in (*bad.values(), tmp_path):
        with pytest.raises(
            RunFolderError, match=f"{path.name}.* is not a checkpoint that cakeflow wrote, or is damaged"
        ):
            IO.load_checkpoint(path)


@pytest.mark.parametrize(
    "tree",
    [
        {"module": "os"},
        {"dict": [["a", {"tensor": "t9"}]]},
        {"dict": [["a", {"tensor": "t0"}], ["b", {"tensor": "t0"}]]},
        {"dict": []},
        {"dict": [["a"]]},
        {"dict": [["a", {"value": {}}]]},
        {"tensor": "t0"},
        {"dict": [[[], {"tensor": "t0"}]]},
        [],
        None,
    ],
)
def test_trees_that_are_none(tmp_path, tree):
    for metadata in ({"format": FORMAT, "tree": json.dumps(tree)}, {"tree": json.dumps({"dict": []})}):
        save_file({"t0": torch.ones(1)}, tmp_path / "a.ckpt", metadata)
        with pytest.raises(RunFolderError, match="damaged"):
            IO.load_checkpoint(tmp_path / "a.ckpt")


def test_a_tree_too_deep_to_be_one(tmp_path):
    save_file({}, tmp_path / "a.ckpt", {"format": FORMAT, "tree": '{"list":[' * 100_000})
    with pytest.raises(RunFolderError, match="damaged"):
        IO.load_checkpoint(tmp_path / "a.ckpt")


def test_a_trainer_writes_small_files_without_pickle_and_reads_them(tiny, requests, quiet, tmp_path):
    moment = torch.eye(tiny.oriented(Site(0, "mlp_out")).shape[1], dtype=torch.float64)
    module = LocateThenEdit(
        tiny, [1, 4], targets=GradientSearch(steps=2), contexts=Contexts(), moments=dict.fromkeys([1, 4], moment)
    )
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    trainer = L.Trainer(**quiet | {"enable_checkpointing": True}, callbacks=[keep], plugins=[SafeCheckpointIO()])
    trainer.fit(module, datamodule=EditDataModule(requests[:4], 2))
    files = sorted(tmp_path.glob("*.ckpt"))
    assert [path.name for path in files] == ["step=1.ckpt", "step=2.ckpt"]
    size = sum(
        tiny.weight(Site(layer, "mlp_out")).numel() * tiny.weight(Site(layer, "mlp_out")).element_size()
        for layer in (1, 4)
    )
    for path in files:
        assert size < path.stat().st_size < size + 20_000
        assert not zipfile.is_zipfile(path)  # as those of torch.save are
        with pytest.raises(ValueError, match=r"."):
            list(pickletools.genops(path.read_bytes()))
        with safe_open(path, "pt") as file:
            assert all(name.startswith("t") for name in file.keys())  # noqa: SIM118
    result = IO.load_checkpoint(files[-1])
    assert result["global_step"] == 2
    own = module.state_dict()
    assert len(result["state_dict"]) == 2
    assert all(torch.equal(weight, own[name]) for name, weight in result["state_dict"].items())
    module.journal.rollback()
    trainer.validate(module, EditDataModule(requests[:4]).val_dataloader(), ckpt_path=files[-1], verbose=False)
    assert torch.equal(
        tiny.weight(Site(4, "mlp_out")),
        result["state_dict"][f"model.{tiny.architecture.path(Site(4, 'mlp_out'))}.weight"],
    )


def test_a_trainer_gets_these_checkpoints_unless_the_user_chose_others(quiet):
    assert type(with_safe_checkpoints(L.Trainer(**quiet)).strategy.checkpoint_io) is SafeCheckpointIO
    chosen = AsyncCheckpointIO(SafeCheckpointIO())
    assert with_safe_checkpoints(L.Trainer(**quiet, plugins=[chosen])).strategy.checkpoint_io is chosen
