"""Second moments of the keys that edits should preserve: all layers in one pass, resumable, cached by content."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from cakeflow.data.sources import Source, read_documents
from cakeflow.errors import StatisticsError, require_choice, require_positive
from cakeflow.forward.corpus import PADDING, default_corpus, name_rows, names, token_stream
from cakeflow.forward.progress import progress_bar
from cakeflow.journal.schema import MomentPoint
from cakeflow.models.architecture import Site
from cakeflow.models.hooks import capture
from cakeflow.models.language import LanguageModel
from cakeflow.models.products import gram
from cakeflow.solvers.covariance import Covariance, rank_below
from cakeflow.storage.atomic import write_tensors
from cakeflow.storage.cache import cache_folder, content_key, require_writable
from cakeflow.storage.hashing import tensor_hash, tensor_hashes
from cakeflow.storage.locks import locked
from cakeflow.storage.tensors import TensorFile, fault_in, read_tensors

log = logging.getLogger(__name__)
FORMAT = 3
"""Format of the files; part of the cache key. 2: eigenvectors as rows. 3: with a hash of every tensor."""
SAVE_EVERY = 30.0
"""Seconds between saves of the partial sums."""
At = Literal["tokens", "names"]


@dataclass(frozen=True)
class Statistics:
    """Settings for collecting the second moment C = E[k k^T] of the keys of each edited layer.

    Attributes:
        source: Corpus: a path, a list of paths, a hub name or a ``datasets.Dataset`` (see ``read_documents``); None
            takes texts about names, and as far as they do not suffice samples of the model (``default_corpus``).
        tokens: Number of tokens to read. Two to ten times the width of the keys is enough; the papers take 100,000
            documents.
        window: Length of a row of tokens; no longer than the model's positions.
        cov_weight: lambda, the number of keys that C counts for in a least-squares solve.
        null_threshold: Limit below which eigenvalues of C count as null; it depends on the model far more than on the
            tokens.
        batch_tokens: Most tokens in one forward pass.
        seed: Seed of the corpus where none is named.
        at: Which keys count: those of all ``tokens``, or of the last token of each document, a name (``names``, the
            keys of SUIT), whatever ``tokens`` says; without a source those are the 512 names of the default corpus.
    """

    source: Source | None = None
    tokens: int = 100_000
    window: int = 512
    cov_weight: float = 15_000.0
    null_threshold: float = 0.02
    batch_tokens: int = 4096
    seed: int = 0
    at: At = "tokens"

    def __post_init__(self) -> None:
        require_choice("statistics.at", self.at, At)
        require_positive("statistics", self, "tokens", "window", "cov_weight", "null_threshold", "batch_tokens")

    def collect(
        self,
        lm: LanguageModel,
        sites: Sequence[Site],
        folder: Path | None = None,
        max_bytes: float | None = None,
        windows: Int[Tensor, "windows window"] | None = None,
    ) -> dict[Site, Covariance]:
        """Load second moments from the cache, and collect those that it lacks in one pass over the corpus.

        The cache key is a hash of everything that decides the values: weights up to the last layer, tokenizer,
        tokens of the corpus, window and types. An interrupted pass is resumed.

        Args:
            lm: The unedited model.
            sites: The projections whose inputs are the keys.
            folder: Folder of the files; by default below ``cache_folder()``.
            max_bytes: Most bytes beyond the model; if the sums of all sites do not fit, there are several passes.
            windows: The corpus as ``windows`` returned it; read here by default.

        Returns:
            Covariance of each site, with its eigenbasis.

        Raises:
            ConfigError: If the corpus cannot be read.
            StatisticsError: If the corpus has fewer tokens than the keys are wide, or a file in the cache is damaged.
                Damaged files are not replaced silently, because collecting them may have taken hours.
        """
        width, last = max(map(lm.key_width, sites)), max(site.layer for site in sites)
        windows = self.windows(lm, width) if windows is None else windows
        key = content_key(lm.fingerprint(last + 1), tensor_hash(windows), str(lm.dtype), FORMAT)
        home = (folder or cache_folder() / "statistics") / key[:16]
        paths = {site: home / f"{_label(site)}.safetensors" for site in sites}
        complete = all(path.exists() for path in paths.values())
        if not complete:
            require_writable(home)
        with nullcontext() if complete else locked(home, wait=True):  # a second process finds what this one collected
            loaded = {site: self._load(path, lm.key_width(site)) for site, path in paths.items() if path.exists()}
            absent = [site for site in sites if site not in loaded]
            log.info("second moments: %s, %d of %d layers to collect", home, len(absent), len(sites))
            at_once = max(1, int(max_bytes / 8 / width**2) - 3) if max_bytes else len(sites)
            for start in range(0, len(absent), at_once):
                _collect(lm, absent[start : start + at_once], windows, home, self)
        loaded |= {site: self._load(paths[site], lm.key_width(site)) for site in absent}
        return {site: loaded[site] for site in sites}

    def windows(self, lm: LanguageModel, width: int) -> Int[Tensor, "windows window"]:
        """Return the corpus as rows of tokens, each with the tokenizer's special tokens in front; -1 pads names.

        Args:
            lm: The model.
            width: Width of the widest keys, which is the least number of tokens.

        Raises:
            ConfigError: If the corpus cannot be read.
            StatisticsError: If it has too few tokens, or is a sampled one that was changed in the cache.
        """
        if self.at == "names":
            named = None if self.source is None else map("".join, read_documents(self.source))
            return name_rows(lm, names() if named is None else [*named])
        texts = default_corpus(lm, self.tokens, self.seed) if self.source is None else read_documents(self.source)
        stream = token_stream(lm, texts, self.tokens)
        front = list(lm.front)
        body = min(self.window, lm.longest) - len(front)
        if len(stream) < max(body, width):
            corpus = "of texts about names" if self.source is None else repr(self.source)
            raise StatisticsError(
                f"corpus {corpus} has {len(stream)} tokens; at least {max(body, width)} are needed for keys {width} "
                "wide (10 times as many are better)"
            )
        rows = [front + stream[i : i + body] for i in range(0, len(stream) - body + 1, body)]
        return torch.tensor(rows)

    def _load(self, path: Path, width: int) -> Covariance:
        file = _read(path)
        shapes: dict[str, tuple[int, ...]] = {"moment": (width, width), "eigenvalues": (width,)}
        shapes["eigenvectors"] = (width, width)
        if "curve" in file.tensors:  # files of 0.1 have none
            shapes["curve"] = _curve_shape(file, "curve")
        if fault := fault_in(file, shapes):
            raise _damaged(path, fault)
        eigen = file.tensors["eigenvalues"], file.tensors["eigenvectors"].T
        return self.covariance(file.tensors["moment"], eigen, file.tensors.get("curve"))

    def covariance(
        self, moment: Tensor, eigen: tuple[Tensor, Tensor] | None = None, curve: Tensor | None = None
    ) -> Covariance:
        """Return a second moment as a covariance with this weight and threshold."""
        return Covariance(moment, self.cov_weight, eigen, self.null_threshold, curve)


def points_of(covariance: Covariance) -> list[MomentPoint]:
    """Return how a second moment settled, ready to be written; empty if that is not known."""
    curve = [] if covariance.curve is None else covariance.curve.tolist()
    return [
        MomentPoint(tokens=int(tokens), change=change, threshold=threshold, null=int(null))
        for tokens, change, threshold, null in curve
    ]


REMEDY = "delete it, and it is collected again"


def _read(path: Path) -> TensorFile:
    return read_tensors(path, f"{path} is damaged: it", StatisticsError, REMEDY)


def _damaged(path: Path, reason: object) -> StatisticsError:
    return StatisticsError(f"{path} is damaged ({reason}); {REMEDY}")


@dataclass
class _Pass:
    """What a pass over the corpus has so far.

    Attributes:
        done: Number of windows read.
        sums: Sum of k k^T over their tokens.
        earlier: C at the last point of the curve, on the CPU.
        curve: Points of ``Covariance.curve``.
    """

    done: int = 0
    sums: dict[Site, Float[Tensor, "d_in d_in"]] = field(default_factory=dict)
    earlier: dict[Site, Float[Tensor, "d_in d_in"]] = field(default_factory=dict)
    curve: dict[Site, Float[Tensor, "points 4"]] = field(default_factory=dict)

    def add(self, site: Site, outer: Float[Tensor, "d_in d_in"]) -> None:
        """Add a batch's sum."""
        self.sums[site] = self.sums[site].add_(outer) if site in self.sums else outer.double()

    def moment(self, site: Site, tokens: int) -> Float[Tensor, "d_in d_in"]:
        """Return C so far, on the CPU."""
        moment = (self.sums[site] / tokens).cpu()
        if not bool(torch.isfinite(moment).all()):
            raise StatisticsError(
                f"{_label(site)}: the second moment is not finite; load the model in bfloat16 or float32"
            )
        return moment

    def note(self, site: Site, tokens: int, moment: Tensor, threshold: float, null: int) -> None:
        """Append a point to the curve of a site: the change of C, and ``null`` eigenvalues below a threshold."""
        before = self.earlier.get(site, torch.zeros_like(moment))
        norm = torch.linalg.matrix_norm(moment).clamp_min(torch.finfo(moment.dtype).tiny)
        change = float(torch.linalg.matrix_norm(moment - before) / norm)
        point = torch.tensor([[tokens, change, threshold, null]], dtype=torch.float64)
        self.curve[site] = torch.cat([self.curve.get(site, point[:0]), point])
        self.earlier[site] = moment


def _collect(
    lm: LanguageModel, sites: Sequence[Site], windows: Int[Tensor, "windows window"], home: Path, settings: Statistics
) -> None:
    """Collect second moments in one pass over the windows; save partial sums every ``SAVE_EVERY`` seconds."""
    partial, count = home / "partial.safetensors", len(windows)
    length = 1 if settings.at == "names" else windows.shape[1]  # keys of a row
    course = _resume(partial, lm, sites, count)
    rows = min(max(1, settings.batch_tokens // windows.shape[1]), -(-count // 2))
    least = max(map(lm.key_width, sites)) / length  # windows; fewer tokens leave C singular
    points = {-(-count // 2**power) for power in range(1, 64) if count >= least * 2**power}
    saved = time.monotonic()
    with progress_bar(count * length, "second moments", "token", initial=course.done * length) as bar:
        while course.done < count:
            batch = windows[course.done : course.done + rows]
            for site, outer in _outer_products(lm, sites, batch.to(lm.device), settings.at):
                course.add(site, outer)
            start, course.done = course.done, course.done + len(batch)
            bar.update(len(batch) * length)
            for site in sites if any(start < point <= course.done for point in points) else ():
                moment = course.moment(site, course.done * length)
                null = rank_below(moment.float(), settings.null_threshold)  # the last point's comes with the eigenbasis
                course.note(site, course.done * length, moment, settings.null_threshold, null)
            if time.monotonic() - saved > SAVE_EVERY:
                _save_partial(partial, course)
                saved = time.monotonic()
    with progress_bar(len(sites), "eigenbases", "layer") as bar:
        for site in sites:
            _finish(home / f"{_label(site)}.safetensors", course, site, count * length, settings.null_threshold)
            bar.update()
    partial.unlink(missing_ok=True)


@torch.no_grad()
def _outer_products(
    lm: LanguageModel, sites: Sequence[Site], ids: Int[Tensor, "rows window"], at: At
) -> Iterator[tuple[Site, Float[Tensor, "d_in d_in"]]]:
    """Yield the sum of k k^T over the tokens of a batch for each site; the forward pass stops after the last layer."""
    last = (ids != PADDING).sum(1) - 1
    ids = ids.clamp_min(0)  # what is padded is behind all that is read
    ordered = sorted(sites, key=lambda site: site.layer)
    with capture(lm, ordered, side="in", stop=True) as inputs:
        lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    for site in ordered:
        keys = inputs[site]
        keys = (
            keys[range(len(ids)), last]
            if at == "names"
            else rearrange(keys, "rows window width -> (rows window) width")
        )
        keys = keys if keys.dtype == torch.float64 else keys.float()
        yield site, gram(keys)


def _resume(partial: Path, lm: LanguageModel, sites: Sequence[Site], windows: int) -> _Pass:
    """Load what a pass had when it was interrupted; nothing if a site is not in it.

    Raises:
        StatisticsError: If the file is damaged, or the numbers in it cannot be those of this pass.
    """
    if not partial.exists():
        return _Pass()
    file = _read(partial)
    parts = ["sum", *{"earlier" for name in file.tensors if name.startswith("earlier/")}]
    widths = {_label(site): lm.key_width(site) for site in sites}
    complete = all(f"sum/{label}" in file.tensors for label in widths)
    shapes = {f"{part}/{label}": (width, width) for part in parts for label, width in widths.items() if complete}
    curves = [f"curve/{label}" for label in widths if complete and "earlier" in parts]
    if fault := fault_in(file, {"done": (), **shapes, **{name: _curve_shape(file, name) for name in curves}}):
        raise _damaged(partial, fault)
    if not complete:
        return _Pass()
    done = int(file.tensors["done"])
    if not 0 < done <= windows:
        raise _damaged(partial, f"sums of {done} windows out of {windows}")
    log.info("second moments: resuming after %d windows", done)
    sums, earlier, curve = (
        {site: file.tensors[name] for site in sites if (name := f"{part}/{_label(site)}") in file.tensors}
        for part in ("sum", "earlier", "curve")
    )
    return _Pass(done, {site: total.to(lm.device) for site, total in sums.items()}, earlier, curve)


def _curve_shape(file: TensorFile, name: str) -> tuple[int, int]:
    """Return the shape of a curve with as many points as the file's."""
    return len(file.tensors[name]) if name in file.tensors and file.tensors[name].dim() else 0, 4


def _save_partial(partial: Path, course: _Pass) -> None:
    parts = {"sum": course.sums, "earlier": course.earlier, "curve": course.curve}
    tensors = {f"{part}/{_label(site)}": each for part, sites in parts.items() for site, each in sites.items()}
    tensors["done"] = torch.tensor(course.done)
    write_tensors(partial, tensors, tensor_hashes(tensors))


def _label(site: Site) -> str:
    return f"layer-{site.layer}-{site.role}"


def _finish(path: Path, course: _Pass, site: Site, tokens: int, threshold: float) -> None:
    """Write a second moment with its eigenbasis and how it settled."""
    moment = course.moment(site, tokens)
    values, vectors = Covariance(moment).eigen
    course.note(site, tokens, moment, threshold, int((values < threshold).sum()))
    change = 100 * float(course.curve[site][-1, 1])
    log.info("second moments: %s changed by %.2f %% since half of the tokens were read", path.stem, change)
    tensors = {"moment": moment, "eigenvalues": values, "eigenvectors": vectors.T, "curve": course.curve[site]}
    write_tensors(path, tensors, tensor_hashes(tensors))
