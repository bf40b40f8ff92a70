"""An adapter: the edits' factors as the pair of low-rank matrices that PEFT adds to a projection."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cakeflow.errors import ExportError
from cakeflow.export.delta import require_finite
from cakeflow.export.manifest import Manifest
from cakeflow.export.options import SERVED_RANKS, ExportOptions
from cakeflow.journal.changes import WeightChange
from cakeflow.journal.journal import Journal
from cakeflow.models.architecture import is_transposed
from cakeflow.storage.atomic import write_tensors

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
Factors = tuple[Float[Tensor, "r d_out"], Float[Tensor, "r d_in"]]
"""Left and right factor of a change."""
STEM = "base_model.model."
"""Beginning of a tensor's name in an adapter."""


def write_lora(journal: Journal, manifest: Manifest, options: ExportOptions) -> tuple[Manifest, Callable[[Path], None]]:
    """The manifest with ranks and what was left out, and a function that fills a folder with an adapter.

    A split adapter has its further parts in the folders ``part-2``, ``part-3`` and so on, each an adapter as well.

    Raises:
        ExportError: If a change has full rank, or a rank is larger than the server takes and it is to be an error.
    """
    base = _base(manifest.model, options)
    factors = {name.removesuffix(".weight"): _factors(updates) for name, updates in _updates(journal).items()}
    ranks, limit = {path: len(right) for path, (_, right) in factors.items()}, options.max_rank or SERVED_RANKS[-1]
    details: dict[str, Any] = {
        "ranks": ranks,
        "max_lora_rank": min(r for r in SERVED_RANKS if r >= min(limit, max(ranks.values()))),
    }
    if max(ranks.values()) > limit:
        if options.over_rank == "error":
            raise ExportError(
                f"the adapter has rank {max(ranks.values())}, the server takes {limit}; choose over_rank='truncate' or "
                "'split', a larger max_rank, or export the model or the delta"
            )
        if options.over_rank == "truncate":
            details["errors"] = {path: _left_out(pair, limit) for path, pair in factors.items()}
            manifest = manifest.model_copy(update={"tolerance": 1.0})
    count = math.ceil(max(ranks.values()) / limit) if options.over_rank == "split" else 1
    transposed = is_transposed(journal.model.module(min(factors)))
    parts = [_part(factors, base, slice(k * limit, (k + 1) * limit), transposed=transposed) for k in range(count)]
    details["parts"] = count

    def write(folder: Path) -> None:
        for number, (tensors, config) in enumerate(parts, 1):
            place = folder / f"part-{number}" if number > 1 else folder
            place.mkdir(exist_ok=True)
            write_tensors(place / TENSORS, tensors, {"format": "pt"})
            (place / CONFIG).write_text(config, encoding="utf-8", newline="\n")

    return manifest.model_copy(update={"details": details}), write


def _part(factors: Mapping[str, Factors], base: str, rows: slice, *, transposed: bool) -> tuple[dict[str, Tensor], str]:
    """Tensors and config of the adapter that has these rows of the factors; the largest singular values come first."""
    chosen = {path: (left[rows], right[rows]) for path, (left, right) in factors.items() if len(right[rows])}
    tensors: dict[str, Tensor] = {}
    for path, (left, right) in chosen.items():
        stem = f"{STEM}{path}"
        tensors |= {f"{stem}.lora_A.weight": right.float(), f"{stem}.lora_B.weight": left.T.float()}
    require_finite(tensors, Path(TENSORS))
    ranks = {path: len(right) for path, (_, right) in chosen.items()}
    return tensors, json.dumps(_config(base, ranks, transposed=transposed), indent=1, sort_keys=True)


def _left_out(factors: Factors, limit: int) -> float:
    """Frobenius norm of what is truncated, relative to the change: squared singular values are those of each row."""
    left, right = factors
    squares = left.square().sum(1) * right.square().sum(1)
    return float((squares[limit:].sum() / squares.sum()).sqrt())


def _base(model: str, options: ExportOptions) -> str:
    """Name by which PEFT finds the base model: a hub id, or a folder from its root.

    Raises:
        ExportError: If it is a GGUF file, which PEFT cannot load.
    """
    name = options.base_of(model)
    if name.endswith(".gguf"):
        raise ExportError(f"PEFT finds no base model in a GGUF file ({name}); name its hub id or folder: base=...")
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def parts_of(folder: Path) -> list[Path]:
    """Return the files of tensors of an adapter and its further parts."""
    return [folder / TENSORS, *sorted(folder.glob(f"part-*/{TENSORS}"))]


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


def _factors(updates: list[tuple[Tensor, Tensor]]) -> Factors:
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
