"""Causal tracing: recovery of a corrupted fact when one state of the clean run is restored."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from cakeflow.errors import ConfigError, Fault, RequestError, require_positive
from cakeflow.forward.generation import cached_bytes
from cakeflow.forward.packing import logits_bytes, pass_bytes, plan, require_bytes
from cakeflow.forward.progress import progress_bar
from cakeflow.forward.tokens import Row
from cakeflow.models.architecture import ROLES, Role, Site
from cakeflow.models.language import LanguageModel
from cakeflow.ranks import in_rounds, spread
from cakeflow.tracing.attribution import Attribution
from cakeflow.tracing.result import LAST_SUBJECT, PLACES, Effect, Trace, TraceCache, place_of
from cakeflow.tracing.runs import TraceRuns

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CausalTrace(Attribution):
    """Average indirect effects of a model's layers (ROME 2.1; CAKE appendix E, eq. 67-69).

    For each fact: a clean run; runs whose subject tokens have Gaussian noise on their embeddings; and, per layer, the
    corrupted runs with the clean output restored. The effect is the gain in probability of the object's first token, a
    mean over the draws. All restorations of a fact share its draws, so they differ by the restoration alone.

    A restored state changes nothing below it and nothing before it, so each restoration runs from its layer and its
    token only (see ``forward.suffix``).

    Attributes:
        role: The restored output: ``block`` (the residual stream), ``mlp_out`` or ``attn_out``.
        window: Number of layers around the traced one that are restored together, clipped at the model's ends; ROME
            takes 10 for MLPs.
        tokens: The restored tokens: the ``subject``'s last one, or ``all`` one by one, from the subject's first on
            (states before it are equal in all runs).
        draws: Number of noise draws.
        noise: Standard deviation of the noise; None takes three times that of the facts' subject embeddings.
        seed: Seed of the noise draws, which do not depend on the other facts.
        max_tokens: Most tokens in one forward pass of several facts, each counted once per draw and layer; changes no
            result.
        max_bytes: Most bytes beyond the model, where they allow fewer tokens; changes no result. A run gives it its
            ``memory_budget``.
    """

    role: Role = "block"
    window: int = 1
    tokens: Literal["subject", "all"] = "subject"
    draws: int = 10
    noise: float | None = None
    seed: int = 0
    max_tokens: int = 4096
    max_bytes: float | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_positive("trace", self, "window", "draws", "max_tokens", "max_bytes")
        if self.noise is not None and not self.noise > 0:
            raise ConfigError(f"trace.noise must be above 0, or None for three standard deviations; got {self.noise}")
        if self.role not in ROLES or self.tokens not in ("subject", "all"):
            raise ConfigError(f"trace.role is one of {ROLES}, trace.tokens 'subject' or 'all'; got "
                              f"{self.role!r} and {self.tokens!r}")  # fmt: skip

    def run(
        self, lm: LanguageModel, rows: Sequence[Row], layers: Sequence[int] = (), folder: Path | None = None
    ) -> Trace:
        """Trace facts, except those whose effects are in the cache.

        Args:
            lm: The model, which stays unchanged.
            rows: n facts as tokens, from ``known_rows``: the subject marked, the object's first token at ``target``.
            layers: l layers; all by default.
            folder: Folder of the cache, by default under ``cache_folder()``. Effects are stored there fact by fact,
                under a hash of model, settings and layers, so that an interrupted trace resumes.

        Returns:
            Effects of every fact, place and layer.

        Raises:
            ConfigError: If a layer is not in the model, or a fact alone does not fit ``max_bytes``.
            RequestError: If there is no fact, or a fact lacks an object or words beside the subject.
            NumericalError: If a probability is not finite.
        """
        layers = require_layers(lm, layers)
        _require_rows(lm, rows)
        noise = self.noise_scale(lm, rows)
        settings = {**asdict(self), "noise": noise, "layers": layers}
        del settings["max_bytes"]  # of the machine, not of what is measured
        log.info("tracing %d facts in %d layers, noise %.4g", len(rows), len(layers), noise)
        cache = TraceCache.of(lm, {**settings, "max_tokens": None}, folder)
        missing = [row for row in dict.fromkeys(rows) if row not in cache]
        with progress_bar(len(missing), "causal trace", "fact") as bar:
            lengths = [self._tokens(row, layers) for row in missing]
            groups = [[missing[i] for i in group] for group in plan(lengths, self._most_tokens(lm, missing, layers))]
            for some in in_rounds(groups):
                for chosen, effects in zip(
                    some, spread(some, lambda rows: self._effects(lm, rows, layers, noise)), strict=True
                ):
                    cache.add(chosen, effects)
                    bar.update(len(chosen))
        return Trace.of([cache[row] for row in rows], settings)

    def within(self, max_bytes: float | None) -> CausalTrace:
        """Return the trace within a limit of memory; a limit of its own stays where that is lower."""
        limits = [each for each in (self.max_bytes, max_bytes) if each is not None]
        return replace(self, max_bytes=min(limits, default=None))

    def _tokens(self, row: Row, layers: Sequence[int]) -> int:
        """Return the tokens of a fact's restored runs."""
        return (row.target - self._first(row)) * self.draws * len(layers)

    def _most_tokens(self, lm: LanguageModel, rows: Sequence[Row], layers: Sequence[int]) -> int:
        """Return how many tokens of restored runs fit in a group of these facts.

        Raises:
            ConfigError: If the largest fact does not fit by itself.
        """
        if self.max_bytes is None or not rows:
            return self.max_tokens
        needed = {row: self.fact_bytes(lm, row, layers) for row in rows}
        work = f"a trace of {len(layers)} layers with {self.draws} draws of noise"
        require_bytes(self.max_bytes, max(needed.values()), work)
        token = max(each / self._tokens(row, layers) for row, each in needed.items())
        return min(self.max_tokens, int(self.max_bytes / token))

    def fact_bytes(self, lm: LanguageModel, row: Row, layers: Sequence[int]) -> int:
        """Return the bytes that a fact takes beyond the model: its restored, its corrupted and its clean runs."""
        hidden, runs = lm.width * lm.embedding.element_size(), self.draws * len(layers)
        restored = self._tokens(row, layers) * pass_bytes(lm) + runs * logits_bytes(lm)
        corrupted = self.draws * row.target * (2 * cached_bytes(lm) + (len(layers) + 1) * hidden + 4 * lm.width)
        return restored + corrupted + row.target * min(lm.depth, len(layers) * self.window) * hidden

    def noise_scale(self, lm: LanguageModel, rows: Sequence[Row]) -> float:
        """Return the noise's standard deviation: ``noise``, or three times that of the facts' subject embeddings."""
        return self.noise or 3 * float(_subject_embeddings(lm, rows).std())

    def attribute(self, lm: LanguageModel, rows: Sequence[Row], layers: Sequence[int]) -> Float[Tensor, "n l"]:
        """Return the effects at the subject's last token."""
        return self.run(lm, rows, layers).effects[:, LAST_SUBJECT]

    @torch.no_grad()
    def _effects(self, lm: LanguageModel, rows: Sequence[Row], layers: Sequence[int], noise: float) -> list[Effect]:
        spans = [[Site(each, self.role) for each in self.span(layer, lm.depth)] for layer in layers]
        runs = TraceRuns.of(lm, rows, spans, noise_of(lm, rows, noise, self))
        low = runs.corrupted()
        sums = torch.zeros(len(rows), len(PLACES), len(layers), dtype=torch.float64)
        counts = torch.zeros(len(rows), len(PLACES), dtype=torch.float64)
        for at in self._positions(rows):
            here = [i for i, (row, token) in enumerate(zip(rows, at, strict=True)) if token < row.target]
            place = [place_of(rows[i], at[i]) for i in here]
            sums[here, place] += (runs.restored(at) - low[:, None])[here]
            counts[here, place] += 1
        return [
            Effect(clean, corrupted, [(total / n).tolist() if n else None for total, n in zip(*each, strict=True)])
            for clean, corrupted, *each in zip(runs.clean.tolist(), low.tolist(), sums, counts, strict=True)
        ]

    def span(self, layer: int, depth: int) -> range:
        """Return the layers that are restored together when ``layer`` is traced."""
        first = layer - self.window // 2
        return range(max(first, 0), min(first + self.window, depth))

    def _positions(self, rows: Sequence[Row]) -> Iterator[list[int]]:
        """Yield for each step the token of every fact at which a state is restored; it may lie past the fact's end."""
        steps = 1 if self.tokens == "subject" else max(row.target - row.start for row in rows)
        for step in range(steps):
            yield [self._first(row) + step for row in rows]

    def _first(self, row: Row) -> int:
        return row.subject if self.tokens == "subject" else row.start


def require_layers(lm: LanguageModel, layers: Sequence[int]) -> list[int]:
    """Return the layers to trace, by default all.

    Raises:
        ConfigError: If one is not in the model.
    """
    if bad := [layer for layer in layers if not 0 <= layer < lm.depth]:
        raise ConfigError(f"layer {bad[0]} is not in the model, which has blocks 0 to {lm.depth - 1}")
    return list(layers) or list(range(lm.depth))


def noise_of(
    lm: LanguageModel, rows: Sequence[Row], scale: float, trace: CausalTrace
) -> Float[Tensor, "n draws time width"]:
    """Draw the noise on the embeddings of each fact's corrupted runs; all facts have equal draws, as in ROME's code."""
    width, longest = lm.embedding.shape[1], max(row.target for row in rows)
    noise = torch.zeros(len(rows), trace.draws, longest, width)
    for i, row in enumerate(rows):
        size = row.subject + 1 - row.start
        draws = torch.randn(size, trace.draws, width, generator=torch.Generator().manual_seed(trace.seed))
        noise[i, :, row.start : row.subject + 1] = scale * rearrange(draws, "time draws width -> draws time width")
    return noise


def _subject_embeddings(lm: LanguageModel, rows: Sequence[Row]) -> Float[Tensor, "tokens width"]:
    ids = [token for row in rows for token in row.ids[row.start : row.subject + 1]]
    return lm.embedding.detach()[torch.tensor(ids, device=lm.device)].float()


def _require_rows(lm: LanguageModel, rows: Sequence[Row]) -> None:
    if not rows:
        raise RequestError([Fault(0, "rows", [], "a trace needs at least one fact")])
    faulty = [i for i, row in enumerate(rows) if not 0 <= row.start <= row.subject < row.target < len(row.ids)]
    if faulty:
        raise RequestError([Fault(i, "row", rows[i], "mark the subject and put the object after it") for i in faulty])
    special = set(lm.tokenizer.all_special_ids)
    alone = [i for i, row in enumerate(rows) if row.subject == row.target - 1 and special >= {*row.ids[: row.start]}]
    if alone:
        texts = {i: lm.tokenizer.decode(list(rows[i].ids[rows[i].start : rows[i].target])) for i in alone}
        remedy = "the subject is the whole prompt, so nothing asks for the object; add words around it, or leave it out"
        raise RequestError([Fault(i, "prompt", text, remedy) for i, text in texts.items()])
