"""Tiny edits in three batches, with everything that they touch in sight."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import lightning as L
import torch

from cakeflow import Contexts, Editor, GradientSearch, LeastSquares, LocateThenEdit, NullSpace
from cakeflow.models import Site
from cakeflow.models.language import LanguageModel
from cakeflow.storage.hashing import tensor_hash

LAYERS = [1, 3]


def module_of(lm: LanguageModel, **changes: Any) -> LocateThenEdit:
    """An edit module that needs no statistics."""
    width = lm.oriented(Site(0, "mlp_out")).shape[1]
    moment = torch.diag(torch.linspace(0, 0.04, width, dtype=torch.float64))
    parts = {
        "layers": LAYERS,
        "contexts": Contexts(),
        "targets": GradientSearch(steps=3, lr=0.3),
        "solver": NullSpace(LeastSquares(0.5)),
        "moments": dict.fromkeys(LAYERS, moment),
    }
    return LocateThenEdit(lm, **{**parts, **changes})


def editor_of(lm: LanguageModel, trainer: dict[str, Any] | None = None, **changes: Any) -> Editor:
    """An editor over it, quiet but for its run folder."""
    quiet = {"enable_progress_bar": False, "accelerator": "cpu"}
    return Editor(module_of(lm, **changes), {**quiet, **(trainer or {})})


def finished_run(lm: LanguageModel, folder: Path, requests: Any) -> Editor:
    """A finished run of three batches in ``run``, beside the unedited model in ``model``."""
    lm.model.float()
    lm.model.save_pretrained(folder / "model")
    lm.tokenizer.save_pretrained(folder / "model")
    editor = editor_of(lm)
    editor.fit(requests[:6], 2, run_dir=folder / "run")
    return editor


def name_of(lm: LanguageModel, layer: int) -> str:
    """Name of the weight that is edited at a layer."""
    return lm.weight_name(Site(layer, "mlp_out"))


def state(lm: LanguageModel, module: LocateThenEdit) -> dict[str, str]:
    """Hashes of every parameter and of every layer's key history."""
    result = {name: tensor_hash(tensor) for name, tensor in lm.model.state_dict().items()}
    for layer in range(lm.depth):
        keys = module.journal.history(name_of(lm, layer)).keys
        result[f"history {layer}"] = "" if keys is None else tensor_hash(keys)
    return result


def content(folder: Path) -> dict[str, str]:
    """Hashes of all files below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class StopAfter(L.Callback):
    """Ends a run as an interrupt would, after so many batches."""

    def __init__(self, batches, error=KeyboardInterrupt):
        self.batches, self.error = batches, error

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == self.batches:
            raise self.error
