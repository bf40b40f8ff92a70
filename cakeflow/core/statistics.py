"""Second moments of the keys that edits should preserve: all layers in one pass, resumable, cached by content."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Int
from torch import Tensor

from cakeflow import ranks
from cakeflow.core.moments import At, Corpus, Plan, curve_shape, damaged, label_of, pass_over, read_moments
from cakeflow.data.sources import Source, read_documents, read_texts
from cakeflow.errors import StatisticsError, require_choice, require_positive
from cakeflow.forward.corpus import default_corpus, name_rows, names, window_rows
from cakeflow.journal.schema import MomentPoint
from cakeflow.models.architecture import Site
from cakeflow.models.language import LanguageModel
from cakeflow.solvers.covariance import Covariance
from cakeflow.storage.cache import cache_folder, content_key, require_writable
from cakeflow.storage.hashing import tensor_hash
from cakeflow.storage.locks import locked
from cakeflow.storage.tensors import fault_in

log = logging.getLogger(__name__)
FORMAT = 4
"""Format of the files; part of the cache key. 2: eigenvectors as rows. 3: a hash of every tensor. 4: exact sums."""


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
        tokens of the corpus, window and types. An interrupted pass is resumed. ``core.moment_parts`` spreads it over
        jobs, with the same result.

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
        corpus = self.corpus(lm, sites, windows)
        home = home_of(corpus.plan.key, folder)
        paths = {site: home / f"{label_of(site)}.safetensors" for site in sites}
        complete = ranks.on_first(lambda: all(path.exists() for path in paths.values()))
        if not complete:
            ranks.on_first(lambda: require_writable(home))
        first = ranks.is_first() and not complete
        with locked(home, wait=True) if first else nullcontext():  # a second process finds what this one collected
            ranks.barrier("the cache of second moments")
            loaded = {site: self._load(path, lm.key_width(site)) for site, path in paths.items() if path.exists()}
            absent = [site for site in sites if site not in loaded]
            log.info("second moments: %s, %d of %d layers to collect", home, len(absent), len(sites))
            width = max(corpus.plan.widths.values())
            at_once = max(1, int(max_bytes / 8 / width**2) - 3) if max_bytes else len(sites)
            for start in range(0, len(absent), at_once):
                pass_over(corpus.of(absent[start : start + at_once]), home)
        loaded |= {site: self._load(paths[site], lm.key_width(site)) for site in absent}
        return {site: loaded[site] for site in sites}

    def corpus(
        self, lm: LanguageModel, sites: Sequence[Site], windows: Int[Tensor, "windows window"] | None = None
    ) -> Corpus:
        """Return the numbered blocks of a pass; arguments and errors as for ``collect``."""
        widths = {label_of(site): lm.key_width(site) for site in sites}
        windows = self.windows(lm, max(widths.values())) if windows is None else windows
        count, window = windows.shape
        fingerprint = lm.fingerprint(max(site.layer for site in sites) + 1)
        plan = Plan(
            key=content_key(fingerprint, tensor_hash(windows), str(lm.dtype), FORMAT),
            windows=count,
            rows=min(max(1, self.batch_tokens // window), -(-count // 2)),
            length=1 if self.at == "names" else window,
            threshold=self.null_threshold,
            widths=widths,
        )
        plan.check()
        return Corpus(lm, sites, windows, self.at, plan)

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
            return name_rows(lm, names() if self.source is None else [*read_texts(self.source)])
        texts = default_corpus(lm, self.tokens, self.seed) if self.source is None else read_documents(self.source)
        window = min(self.window, lm.longest)
        rows, tokens = window_rows(lm, texts, self.tokens, window)
        if tokens < (least := max(window - len(lm.front), width)):
            corpus = "of texts about names" if self.source is None else repr(self.source)
            raise StatisticsError(
                f"corpus {corpus} has {tokens} tokens; at least {least} are needed for keys {width} wide (10 times as "
                "many are better)"
            )
        return rows

    def _load(self, path: Path, width: int) -> Covariance:
        file = read_moments(path)
        shapes: dict[str, tuple[int, ...]] = {"moment": (width, width), "eigenvalues": (width,)}
        shapes["eigenvectors"] = (width, width)
        if "curve" in file.tensors:  # files of 0.1 have none
            shapes["curve"] = curve_shape(file, "curve")
        if fault := fault_in(file, shapes):
            raise damaged(path, fault)
        eigen = file.tensors["eigenvalues"], file.tensors["eigenvectors"].T
        return self.covariance(file.tensors["moment"], eigen, file.tensors.get("curve"))

    def covariance(
        self, moment: Tensor, eigen: tuple[Tensor, Tensor] | None = None, curve: Tensor | None = None
    ) -> Covariance:
        """Return a second moment as a covariance with this weight and threshold."""
        return Covariance(moment, self.cov_weight, eigen, self.null_threshold, curve)


def home_of(key: str, folder: Path | None = None) -> Path:
    """Return the folder of the second moments with a content key.

    Args:
        key: The content key.
        folder: Folder of the statistics of all models; by default below ``cache_folder()``.
    """
    return (folder or cache_folder() / "statistics") / key[:16]


def points_of(covariance: Covariance) -> list[MomentPoint]:
    """Return how a second moment settled, ready to be written; empty if that is not known."""
    curve = [] if covariance.curve is None else covariance.curve.tolist()
    return [
        MomentPoint(tokens=int(tokens), change=change, threshold=threshold, null=int(null))
        for tokens, change, threshold, null in curve
    ]
