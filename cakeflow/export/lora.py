"""An adapter: the edits' factors as the pair of low-rank matrices that PEFT adds to a projection."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cakeflow.errors import ExportError
from cakeflow.export.delta import require_finite
from cakeflow.export.manifest import Manifest
from cakeflow.journal.changes import WeightChange
from cakeflow.journal.journal import Journal
from cakeflow.models.architecture import is_transposed
from cakeflow.storage.atomic import write_tensors

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
STEM = "base_model.model."
"""Beginning of a tensor's name in an adapter."""


def write_lora(journal: Journal, manifest: Manifest) -> Callable[[Path], None]:
    """A function that fills a folder with an adapter; see ``export``."""
    factors = {name.removesuffix(".weight"): _factors(updates) for name, updates in _updates(journal).items()}
    tensors: dict[str, Tensor] = {}
    for path, (left, right) in factors.items():
        stem = f"{STEM}{path}"
        tensors |= {f"{stem}.lora_A.weight": right.float(), f"{stem}.lora_B.weight": left.T.float()}
    require_finite(tensors, Path(TENSORS))
    ranks = {path: len(right) for path, (_, right) in factors.items()}
    transposed = is_transposed(journal.model.module(min(factors)))
    config = json.dumps(_config(manifest.model, ranks, transposed=transposed), indent=1, sort_keys=True)

    def write(folder: Path) -> None:
        write_tensors(folder / TENSORS, tensors, {"format": "pt"})
        (folder / CONFIG).write_text(config, encoding="utf-8")

    return write


def factors_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]]]:
    """Return the two matrices of each projection, by its path, from the tensors of an adapter's file."""
    down, up = ".lora_A.weight", ".lora_B.weight"
    paths = {name.removeprefix(STEM).removesuffix(down): name for name in tensors if name.endswith(down)}
    return {path: (tensors[name], tensors[name.removesuffix(down) + up]) for path, name in paths.items()}


class Adapted(nn.Module):
    """A projection with an adapter beside it, computed as PEFT does."""

    def __init__(self, inner: nn.Module, down: Float[Tensor, "r d_in"], up: Float[Tensor, "d_out r"]) -> None:
        super().__init__()
        self.inner, self.down, self.up = inner, down, up

    def forward(self, keys: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        """Return the projection's output plus the adapter's."""
        output: Tensor = self.inner(keys)
        down, up = self.down.to(output.device), self.up.to(output.device)
        return output + (keys.to(down.dtype) @ down.T @ up.T).to(output.dtype)


def _updates(journal: Journal) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Name of each edited weight -> left and right factor of its updates.

    Raises:
        ExportError: Naming the first change that is no product of factors.
    """
    updates: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for step in journal:
        for part in step.changes:
            update = part.change.update if isinstance(part.change, WeightChange) else None
            if update is None or update.left is None:
                when = "" if step.hashes else ", made when the run ended,"
                raise ExportError(
                    f"batch {step.number}{when} changed {part.place} by a matrix of full rank, which no LoRA adapter "
                    "holds: masks (RECT), restraints (PRUNE) and fine-tuning (ft) give such changes; export the delta "
                    "or the model instead"
                )
            updates.setdefault(part.place, []).append((update.left, update.right))
    return updates


def _factors(updates: list[tuple[Tensor, Tensor]]) -> tuple[Float[Tensor, "r d_out"], Float[Tensor, "r d_in"]]:
    """Left and right factor of the sum of a weight's updates, of the least rank.

    The batches' own factors may be large and cancel, and there may be more of them than dimensions. So QR of each side
    and the SVD of the small matrix between (in float64) give the least rank, with the singular values shared evenly.
    """
    lefts = torch.cat([left for left, _ in updates]).double()
    rights = torch.cat([right for _, right in updates]).double()
    (left_basis, left_core), (right_basis, right_core) = torch.linalg.qr(lefts.T), torch.linalg.qr(rights.T)
    outer, values, inner = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    zero = values[0] * max(left_basis.shape[0], right_basis.shape[0]) * torch.finfo(torch.float64).eps
    rank = max(1, int((values > zero).sum()))
    root = values[:rank].sqrt()
    return (left_basis @ (outer[:, :rank] * root)).T, (root[:, None] * inner[:rank]) @ right_basis.T


def _config(base: str, ranks: dict[str, int], *, transposed: bool) -> dict[str, Any]:
    """``adapter_config.json``: every scaling is alpha / r = 1."""
    most = max(ranks.values())
    others = {path: rank for path, rank in ranks.items() if rank != most}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": others,
    }
