"""Second moments of the keys that edits should preserve: all layers in one pass, resumable, kept by content."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm

from cakeflow.data.sources import read_texts
from cakeflow.errors import ConfigError, StatisticsError
from cakeflow.forward.corpus import sampled_corpus, token_stream
from cakeflow.models.architecture import Site
from cakeflow.models.hooks import capture
from cakeflow.models.language import LanguageModel
from cakeflow.solvers.covariance import Covariance
from cakeflow.storage.atomic import write_tensors
from cakeflow.storage.cache import cache_folder

log = logging.getLogger(__name__)


FORMAT = 2
"""Of the files: eigenvectors as rows."""


SAVE_EVERY = 30.0
"""Seconds between saved partial sums."""


@dataclass(frozen=True)
class Statistics:
    """How the second moment C = E[k k^T] of each edited layer's keys is collected.

    Attributes:
        source: Corpus: a path, a list of paths, a hub name or a ``datasets.Dataset`` (see ``read_texts``); None
            samples a corpus from the model itself.
        tokens: Token budget. Twice to ten times the key's width already serves; the papers take 100,000 documents.
        window: Tokens read at once.
        cov_weight: lambda: C counts as this many keys in a least-squares solve.
        null_threshold: Eigenvalues of C below it count as null; it depends on the model far more than on the tokens.
        batch_tokens: Most tokens in one forward pass.
        seed: Of the sampled corpus.
    """

    source: Any = None
    tokens: int = 100_000
    window: int = 512
    cov_weight: float = 15_000.0
    null_threshold: float = 0.02
    batch_tokens: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "window", "cov_weight", "null_threshold", "batch_tokens"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"statistics.{name} must be above 0, got {getattr(self, name)}")

    def collect(
        self, lm: LanguageModel, layers: Sequence[int], folder: Path | None = None, budget: float | None = None
    ) -> dict[int, Covariance]:
        """Load the second moments from the cache, or collect what is missing in one pass over the corpus.

        The cache key is a hash of everything that decides the values: weights up to the last layer, tokenizer,
        tokens of the corpus, window and types. A pass that was interrupted goes on where it stopped.

        Args:
            lm: The model, not edited.
            layers: Layers to cover.
            folder: Where to keep the files; by default under ``cache_folder()``.
            budget: Most bytes beyond the model; where it does not hold all layers' sums, there are several passes.

        Returns:
            Layer -> covariance, with its eigenbasis.

        Raises:
            StatisticsError: If the corpus is unreadable or has fewer tokens than the keys are wide, or a file in the
                cache is damaged; none is replaced without a word, because it may have cost hours.
        """
        windows = self._windows(lm)
        key = hashlib.sha256(windows.numpy().tobytes())
        key.update(json.dumps([lm.fingerprint(max(layers) + 1), self.window, str(lm.dtype), FORMAT]).encode())
        home = (folder or cache_folder() / "statistics") / key.hexdigest()[:16]
        paths = {layer: home / f"layer-{layer}.safetensors" for layer in layers}
        known = {layer: self._load(path, lm.key_width(layer)) for layer, path in paths.items() if path.exists()}
        missing = [layer for layer in layers if layer not in known]
        log.info("second moments: %s, %d of %d layers to collect", home, len(missing), len(layers))
        at_once = max(1, int(budget / 8 / lm.key_width(0) ** 2) - 3) if budget else len(layers)
        for start in range(0, len(missing), at_once):
            _collect(lm, missing[start : start + at_once], windows, home, max(1, self.batch_tokens // self.window))
        known |= {layer: self._load(paths[layer], lm.key_width(layer)) for layer in missing}
        return {layer: known[layer] for layer in layers}

    def _windows(self, lm: LanguageModel) -> Int[Tensor, "windows window"]:
        """The corpus as rows of tokens, after whatever the tokenizer puts in front of a text."""
        source = sampled_corpus(lm, self.tokens, self.seed) if self.source is None else self.source
        stream = token_stream(lm, read_texts(source), self.tokens)
        front: list[int] = lm.tokenizer("")["input_ids"]
        body = self.window - len(front)
        width = lm.key_width(0)
        if len(stream) < max(body, width):
            raise StatisticsError(
                f"corpus {source!r} has {len(stream)} tokens; at least {max(body, width)} are needed for keys "
                f"{width} wide (10 times that is a good budget)"
            )
        rows = [front + stream[i : i + body] for i in range(0, len(stream) - body + 1, body)]
        return torch.tensor(rows)

    def _load(self, path: Path, width: int) -> Covariance:
        tensors = _read(path, {"moment": (width, width), "eigenvalues": (width,), "eigenvectors": (width, width)})
        return self.covariance(tensors["moment"], (tensors["eigenvalues"], tensors["eigenvectors"].T))

    def covariance(self, moment: Tensor, eigen: tuple[Tensor, Tensor] | None = None) -> Covariance:
        """A second moment with this model's weight and threshold."""
        return Covariance(moment, self.cov_weight, eigen, self.null_threshold)


def convergence(path: Path) -> float:
    """Relative change of C over the second half of its tokens, ``|C - C_half| / |C|``, read from a layer's file.

    Raises:
        StatisticsError: If the file is damaged.
    """
    try:
        with safe_open(path, "pt") as handle:
            return float(handle.metadata()["change"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error


def _read(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of a file of ours, mapped from disk: what is not used is not read.

    Args:
        path: The file.
        shapes: Of the tensors that it must have.

    Raises:
        StatisticsError: If it is damaged.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error
    for name, shape in shapes.items():
        if name not in tensors or tensors[name].shape != shape or not tensors[name].is_floating_point():
            raise _damaged(path, f"no {name} of shape {shape}")
    return tensors


def _damaged(path: Path, reason: object) -> StatisticsError:
    return StatisticsError(f"{path} is damaged ({reason}); delete it, it is made again")


def _collect(
    lm: LanguageModel, layers: Sequence[int], windows: Int[Tensor, "windows window"], home: Path, rows: int
) -> None:
    """One pass over the windows; partial sums are saved every ``SAVE_EVERY`` seconds."""
    partial = home / "partial.safetensors"
    done, sums, halves = _resume(partial, layers, lm.device)
    saved = time.monotonic()
    with tqdm(total=windows.numel(), desc="second moments", unit="token", initial=done * windows.shape[1]) as bar:
        rows = min(rows, -(-len(windows) // 2))
        for batch in windows[done:].split(rows):
            for layer, outer in _outer_products(lm, layers, batch.to(lm.device)):
                sums[layer] = sums[layer].add_(outer) if layer in sums else outer.double()
            done += len(batch)
            bar.update(batch.numel())
            if not halves and done + rows > len(windows) // 2:
                halves = {layer: (total / (done * windows.shape[1])).cpu() for layer, total in sums.items()}
            if time.monotonic() - saved > SAVE_EVERY:
                _save_partial(partial, done, sums, halves)
                saved = time.monotonic()
    for layer in tqdm(layers, desc="eigenbases", unit="layer", delay=2):
        _finish(home / f"layer-{layer}.safetensors", sums[layer] / windows.numel(), halves[layer])
    partial.unlink(missing_ok=True)


@torch.no_grad()
def _outer_products(
    lm: LanguageModel, layers: Sequence[int], ids: Int[Tensor, "rows window"]
) -> Iterator[tuple[int, Float[Tensor, "d_in d_in"]]]:
    """Sum of k k^T over the tokens of a batch, layer by layer; the forward pass stops after the last layer."""
    sites = [Site(layer, "mlp_out") for layer in sorted(layers)]
    with capture(lm, sites, side="in", stop=True) as seen:
        lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    for site in sites:
        keys = rearrange(seen[site], "rows window width -> (rows window) width")
        keys = keys if keys.dtype == torch.float64 else keys.float()
        yield site.layer, _gram(keys)


def _gram(keys: Float[Tensor, "n d_in"], parts: int = 6) -> Float[Tensor, "d_in d_in"]:
    """K^T K, only the block columns on and above the diagonal multiplied: the matrix is symmetric."""
    ends = [len(keys.T) * (i + 1) // parts for i in range(parts)]
    gram = keys.new_empty(ends[-1], ends[-1])
    for start, end in zip([0, *ends], ends, strict=False):
        torch.mm(keys[:, :end].T, keys[:, start:end], out=gram[:end, start:end])
        gram[start:end, :start] = gram[:start, start:end].T
    return gram


def _resume(
    partial: Path, layers: Sequence[int], device: torch.device
) -> tuple[int, dict[int, Tensor], dict[int, Tensor]]:
    if not partial.exists():
        return 0, {}, {}
    tensors = _read(partial, {})
    wanted = {"done", *(f"sum/{layer}" for layer in layers)}
    if wanted != {name for name in tensors if not name.startswith("half/")}:
        return 0, {}, {}
    done = int(tensors["done"])
    log.info("second moments: going on after %d windows", done)
    sums = {layer: tensors[f"sum/{layer}"].to(device) for layer in layers}
    return done, sums, {layer: tensors[f"half/{layer}"] for layer in layers if f"half/{layer}" in tensors}


def _save_partial(partial: Path, done: int, sums: dict[int, Tensor], halves: dict[int, Tensor]) -> None:
    tensors = {f"sum/{layer}": total for layer, total in sums.items()}
    tensors |= {f"half/{layer}": half for layer, half in halves.items()}
    write_tensors(partial, {**tensors, "done": torch.tensor(done)})


def _finish(path: Path, moment: Float[Tensor, "d_in d_in"], half: Float[Tensor, "d_in d_in"]) -> None:
    moment, half = moment.cpu(), half.cpu()
    if not bool(torch.isfinite(moment).all()):
        raise StatisticsError(f"{path.stem}: the second moment is not finite; load the model in bfloat16 or float32")
    values, vectors = Covariance(moment).eigen
    change = float(torch.linalg.matrix_norm(moment - half) / torch.linalg.matrix_norm(moment))
    log.info("second moments: %s changed by %.2f %% over the second half of the tokens", path.stem, 100 * change)
    tensors = {"moment": moment, "eigenvalues": values, "eigenvectors": vectors.T}
    write_tensors(path, tensors, {"change": repr(change)})
