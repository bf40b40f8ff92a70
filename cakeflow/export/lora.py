"""An adapter: the edits' factors as the pair of low-rank matrices that PEFT adds to a projection."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.errors import ExportError
from cakeflow.export.manifest import Manifest
from cakeflow.journal.journal import Journal
from cakeflow.models.architecture import Site, is_transposed
from cakeflow.storage.atomic import write_tensors

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def write_lora(journal: Journal, manifest: Manifest) -> Callable[[Path], None]:
    """What fills a folder with an adapter; see ``export``."""
    factors = {layer: _factors(journal, layer) for layer in _layers(journal)}
    paths = {layer: journal.lm.architecture.path(Site(layer, "mlp_out")) for layer in factors}
    tensors: dict[str, Tensor] = {}
    for layer, (left, right) in factors.items():
        stem = f"base_model.model.{paths[layer]}"
        tensors |= {f"{stem}.lora_A.weight": right.float(), f"{stem}.lora_B.weight": left.T.float()}
    ranks = {paths[layer]: len(right) for layer, (_, right) in factors.items()}
    transposed = is_transposed(journal.lm.module(Site(min(factors), "mlp_out")))
    config = json.dumps(_config(manifest.model, ranks, transposed=transposed), indent=1, sort_keys=True)

    def write(folder: Path) -> None:
        write_tensors(folder / TENSORS, tensors, {"format": "pt"})
        (folder / CONFIG).write_text(config, encoding="utf-8")

    return write


def _layers(journal: Journal) -> list[int]:
    """The edited layers.

    Raises:
        ExportError: Naming the first change that is no product of factors.
    """
    for step in journal:
        for part in step.layers:
            if part.update.left is None:
                when = "" if step.hashes else ", made when the run ended,"
                raise ExportError(
                    f"batch {step.number}{when} changed layer {part.layer} by a matrix of full rank, which no LoRA "
                    "adapter holds: masks (RECT), restraints (PRUNE) and fine-tuning (ft) give such changes; export "
                    "the delta or the model instead"
                )
    return sorted({part.layer for step in journal for part in step.layers})


def _factors(journal: Journal, layer: int) -> tuple[Float[Tensor, "r d_out"], Float[Tensor, "r d_in"]]:
    """Left and right of the sum of a layer's changes.

    The batches' own factors may be large and cancel, and there may be more of them than dimensions. So QR of each side
    and the SVD of the small matrix between (in float64) give the least rank, with the singular values shared evenly.
    """
    updates = [part.update for step in journal for part in step.layers if part.layer == layer]
    lefts = torch.cat([update.left for update in updates if update.left is not None]).double()
    rights = torch.cat([update.right for update in updates]).double()
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
