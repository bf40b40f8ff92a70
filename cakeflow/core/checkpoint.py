"""Lightning's checkpoints as safetensors files, without pickle: reading one cannot run code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO
from torch import Tensor

from cakeflow.errors import ConfigError, RunFolderError
from cakeflow.storage.atomic import write_tensors
from cakeflow.storage.tensors import read_tensors

FORMAT = "cakeflow checkpoint 1"
"""Format of the file, in its metadata."""
NOT_OURS, REMEDY = "is not a checkpoint that cakeflow wrote, or is damaged", "use an earlier one"


class SafeCheckpointIO(CheckpointIO):
    """Writes a Trainer's checkpoint (nested dicts, lists and tuples of plain values and tensors) to one file.

    The tensors are numbered; a JSON tree in the metadata of the file says where they belong.

    Example:
        >>> import tempfile, torch
        >>> path = tempfile.mkdtemp() + "/last.ckpt"
        >>> SafeCheckpointIO().save_checkpoint({"step": 3, "state": {0: torch.ones(2)}}, path)
        >>> SafeCheckpointIO().load_checkpoint(path)
        {'step': 3, 'state': {0: tensor([1., 1.])}}
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint, whole or not at all.

        Args:
            checkpoint: Content of the checkpoint.
            path: File to write.
            storage_options: Not used; the Trainer passes it on.

        Raises:
            ConfigError: If a value is neither plain nor a tensor, naming its place in the tree.
        """
        tensors: dict[str, Tensor] = {}
        tree = _packed(checkpoint, "checkpoint", tensors)
        write_tensors(Path(path), tensors, {"format": FORMAT, "tree": json.dumps(tree)})

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Args:
            path: File to read.
            map_location: Device of the tensors or its name; the CPU for anything else.
            weights_only: Not used; files contain only numbers and text.

        Raises:
            RunFolderError: If the file was not written by this class, is cut off, or has a damaged tree.
        """
        device = str(map_location) if isinstance(map_location, (str, torch.device)) else "cpu"
        file = read_tensors(Path(path), f"{path} {NOT_OURS}: it", RunFolderError, REMEDY)
        metadata, tensors = file.metadata, {name: each.to(device) for name, each in file.tensors.items()}
        try:
            if metadata.get("format") != FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
            checkpoint = _unpacked(json.loads(metadata["tree"]), tensors)
            if tensors or not isinstance(checkpoint, dict):
                raise ValueError(f"its tree is not a checkpoint, or leaves out {sorted(tensors)}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RunFolderError(f"{path} {NOT_OURS}: {error}; {REMEDY}") from error
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint, if it exists."""
        Path(path).unlink(missing_ok=True)


def with_safe_checkpoints(trainer: L.Trainer) -> L.Trainer:
    """Let a Trainer write safetensors checkpoints instead of pickled ones, unless it has a ``CheckpointIO`` already."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = SafeCheckpointIO()
    return trainer


def _packed(value: Any, place: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return a node of the tree, ``{kind: content}``, and add its tensors to ``tensors``."""
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, (str, int))]:
            raise ConfigError(f"{place} has the key {wrong[0]!r}; keys of a checkpoint must be text or whole numbers")
        return {"dict": [[key, _packed(each, f"{place}[{key!r}]", tensors)] for key, each in value.items()]}
    if isinstance(value, (list, tuple)):
        parts = [_packed(each, f"{place}[{i}]", tensors) for i, each in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": parts}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise ConfigError(
        f"{place} is a {type(value).__name__}; a checkpoint can hold plain values and tensors only: give it such "
        "a state_dict, or leave it out"
    )


def _unpacked(node: Any, tensors: dict[str, Tensor]) -> Any:
    """Return the value of a node; every tensor is used once.

    Raises:
        ValueError: If the node is malformed.
    """
    kind, content = next(iter(node.items())) if isinstance(node, dict) and len(node) == 1 else ("", node)
    if kind == "tensor":
        return tensors.pop(content)
    if kind == "dict":
        return {key: _unpacked(each, tensors) for key, each in content}
    if kind in ("list", "tuple"):
        parts = [_unpacked(each, tensors) for each in content]
        return tuple(parts) if kind == "tuple" else parts
    if kind == "value" and not isinstance(content, (dict, list)):
        return content
    raise ValueError(f"{str(node)[:60]!r} in its tree is not a node")
