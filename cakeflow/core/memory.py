"""Memory beyond the model: estimated from shapes, limited to a budget, and measured."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import DynamicCache

from cakeflow.errors import ConfigError
from cakeflow.forward.loss import WeightLoss
from cakeflow.forward.packing import GIB, pass_bytes, require_bytes
from cakeflow.forward.tokens import Row, TextBatch
from cakeflow.models.architecture import Site
from cakeflow.models.hooks import capture, frozen, inject
from cakeflow.models.language import LanguageModel
from cakeflow.models.shards import local

PASS_TOKENS = 8192
"""Most tokens in a forward pass without gradients."""
ON_ACCELERATOR = 16
"""How many times as many suffix tokens a pass has on an accelerator, which small passes leave idle, as on a CPU."""
LEAST_BYTES, MOST_BYTES = 1 * GIB, 8 * GIB
"""Ends of the limit for target searches and keys without a budget; more at once would hardly be faster."""
LEAST_ON_ACCELERATOR = 4 * GIB
"""The lower end on an accelerator, where a small model's passes would be too small to pay for their launch."""
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class TokenCost:
    """Bytes per token in a pass with gradients, such as those of the target search.

    Attributes:
        graph: Tensors that the blocks above the value site, or all of them, save for the backward pass.
        cache: Attention keys and values of those blocks.
        through: Largest temporary tensors of a block in a pass without gradients.
        hidden: One hidden state.
        logits: Logits of one position with their losses and gradients: seven float32 copies.
    """

    graph: int
    cache: int
    through: int
    hidden: int
    logits: int

    @classmethod
    def above(cls, lm: LanguageModel, site: Site | None, tokens: int = 8) -> TokenCost:
        """Count the bytes by running a few tokens.

        Args:
            lm: The model, or one of the same shape on the meta device.
            site: The topmost edited projection; None for gradients by the embeddings.
            tokens: Number of tokens to run.
        """
        embeds = lm.embedding.new_zeros(1, tokens, lm.embedding.shape[1]).requires_grad_(site is None)
        delta = lm.embedding.new_zeros(1, lm.width).requires_grad_()
        place = torch.zeros(1, dtype=torch.long, device=lm.device)
        cache, saved = DynamicCache() if lm.places_tokens else None, {}
        own, sharded = _storages(lm), lm.sharded

        def save(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in (_storages(lm) if sharded else own):  # of a sharded model, some are gathered now
                saved[storage._cdata] = storage  # a reference keeps it alive: no other storage gets its address
            return tensor.detach()  # the tensor itself would keep its graph alive, and the model with it

        with (
            frozen(lm),
            torch.enable_grad(),
            saved_tensors_hooks(save, lambda tensor: tensor),
            nullcontext() if site is None else inject(lm, Site(site.layer), delta, place),
            capture(lm, [Site(lm.depth - 1)], stop=True),
        ):
            lm(inputs_embeds=embeds, past_key_values=cache, use_cache=cache is not None)
        above: list[Any] = cache.layers[0 if site is None else site.layer + 1 :] if cache else []
        size = lm.embedding.element_size()
        return cls(
            graph=sum(storage.nbytes() for storage in saved.values()) // tokens,
            cache=sum(each.keys.nbytes + each.values.nbytes for each in above) // tokens,
            through=pass_bytes(lm, site),
            hidden=lm.width * size,
            logits=len(lm.embedding) * 7 * 4,
        )

    def of_pass(self, row: Row, *, essence: bool = False) -> int:
        """Return the bytes of a row's suffix in a pass with gradients."""
        suffix, reads = (1, 1) if essence else (_suffix(row), len(row.ids) - row.target)
        return suffix * self.graph + (row.fact + suffix) * self.cache + reads * self.logits

    def most_tokens(
        self, rows: Sequence[tuple[int, int]], max_bytes: float | None, most: int, work: str = "", further: int = 0
    ) -> int:
        """Return how many tokens of some rows fit in a pass with gradients.

        Args:
            rows: For each row its tokens, and how many of its logits are read.
            max_bytes: Most bytes; None for no limit.
            most: Most tokens in any case.
            work: What the pass is for, for the error; without it nothing is refused, and one row may exceed the limit.
            further: Bytes that each token takes beside the graph.

        Raises:
            ConfigError: If the largest row does not fit by itself.
        """
        if max_bytes is None or not rows:
            return most
        needed = [tokens * (self.graph + self.through + further) + reads * self.logits for tokens, reads in rows]
        if work:
            require_bytes(max_bytes, max(needed), work)
        dearest = max(each / tokens for each, (tokens, _) in zip(needed, rows, strict=True))
        return max(1, min(most, int(max_bytes / dearest)))

    def of_search(self, rows: Sequence[Row]) -> int:
        """Return the bytes held per fact during the target search: prefixes, suffixes, the essence before the edit."""
        return sum(row.fact * self.cache + 2 * len(row.ids) * self.hidden for row in rows) + self.logits // 7


@dataclass(frozen=True)
class Footprint:
    """Bytes that one edit batch takes beyond the model, and the sizes of its parts.

    Attributes:
        stored: Originals and, for half precision, float32 masters; held as long as the edits last.
        keys: Bytes while keys are read.
        targets: Bytes during the target search.
        solve: Bytes while a layer is solved.
        facts: Number of facts in one part of the target search.
        suffix_tokens: Most suffix tokens in a pass with gradients.
        pass_tokens: Most tokens in a pass without gradients.
    """

    stored: int
    keys: int
    targets: int
    solve: int
    facts: int
    suffix_tokens: int
    pass_tokens: int

    @property
    def peak(self) -> int:
        """Largest number of bytes at one time."""
        return self.stored + max(self.keys, self.targets, self.solve)

    @classmethod
    def estimate(
        cls,
        lm: LanguageModel,
        batch: TextBatch,
        sites: Sequence[Site],
        *,
        max_tokens: int,
        max_bytes: float | None = None,
        earlier: int = 0,
        matrices: int = 0,
    ) -> Footprint:
        """Choose the largest parts that fit, and estimate the peak.

        Args:
            lm: The model; it may be on the meta device, because only shapes matter.
            batch: n facts.
            sites: The edited projections.
            max_tokens: Most suffix tokens in a pass with gradients on a CPU (``TargetSearch.max_tokens``).
            max_bytes: Most bytes beyond the model; None aims at the model's own size, between ``LEAST_BYTES``
                (``LEAST_ON_ACCELERATOR``) and ``MOST_BYTES``, and refuses nothing.
            earlier: Number of facts from earlier batches whose keys are preserved.
            matrices: Float64 matrices as large as a weight that the solver holds (``Solver.matrices``).

        Raises:
            ConfigError: If the limit is too small for the smallest parts; the message names the phase.
        """
        cost, n = TokenCost.above(lm, sites[-1]), len(batch)
        weights = [lm.module(site).get_parameter("weight") for site in sites]
        d_in, stored = lm.key_width(sites[0]), sum(map(_stored, weights))
        free = (_default_bytes(lm) if max_bytes is None else max_bytes) - stored
        prompts = sum(row.fact + 1 for rows in batch.rows for row in rows)
        hidden = prompts * cost.hidden
        pass_tokens = int(max(256, min(PASS_TOKENS, prompts, free / 8 / cost.through)))
        squares = 1 if n + earlier <= d_in else 5  # eigenvectors of C; C, the system and its factor in the primal form
        solve = hidden + 8 * d_in * (squares * d_in + 8 * n + 4 * earlier) + matrices * 8 * weights[0].numel()
        suffix = sum(map(_suffix, (row for rows in batch.rows for row in rows))) / n
        token = max(_per_token(cost, batch))
        fact = max(cost.of_search([*rows, end]) for rows, end in zip(batch.rows, batch.essence, strict=True))
        longest = max(_suffix(row) for rows in batch.rows for row in rows)
        max_tokens *= 1 if lm.device.type == "cpu" else ON_ACCELERATOR
        tokens = max(int(min(max_tokens, free / 2 / token)), longest)
        facts = max(1, int(min(n, (free - hidden - tokens * token) / fact)))
        facts = ceil(n / ceil(n / facts))  # parts of equal size
        targets = int(hidden + facts * fact + min(tokens, facts * suffix) * token)
        keys = hidden + pass_tokens * cost.through + 32 * n * d_in
        footprint = cls(stored, keys, targets, solve, facts, tokens, pass_tokens)
        if max_bytes is not None and footprint.peak > max_bytes:
            raise ConfigError(footprint._excess(max_bytes))
        return footprint

    def _excess(self, max_bytes: float) -> str:
        parts = {"reading keys": self.keys, "searching one target value": self.targets, "solving a layer": self.solve}
        worst = max(parts, key=parts.__getitem__)
        remedy = "use shorter or fewer contexts" if worst.startswith("searching") else "edit fewer facts in a batch"
        return (
            f"memory_budget is {max_bytes / GIB:.3g} GiB, but {worst} takes about {self.peak / GIB:.3g} GiB beyond the "
            f"model; {remedy}, or raise memory_budget"
        )


def _storages(lm: LanguageModel) -> set[int]:
    return {local(parameter).untyped_storage()._cdata for parameter in lm.model.parameters()}


def _stored(weight: Tensor) -> int:
    """Return the bytes of an original and a master; the originals of GPU weights are in host memory."""
    master = 4 * weight.numel() if weight.dtype in (torch.float16, torch.bfloat16) else 0
    return master + (weight.nbytes if weight.device.type == "cpu" else 0)


def _default_bytes(lm: LanguageModel) -> float:
    least = LEAST_BYTES if lm.device.type == "cpu" else LEAST_ON_ACCELERATOR
    return min(MOST_BYTES, max(least, sum(parameter.nbytes for parameter in lm.model.parameters())))


def _suffix(row: Row) -> int:
    return len(row.ids) - 1 - row.fact


def loss_tokens(lm: LanguageModel, site: Site, batch: TextBatch, max_bytes: float | None) -> int:
    """Return how many tokens of a batch a pass of its loss may have: for solvers that descend on it.

    Args:
        lm: The model.
        site: The projection whose weight is changed.
        batch: The facts.
        max_bytes: Most bytes beyond the model; None for no limit.
    """
    if max_bytes is None:
        return WeightLoss.max_tokens
    cost, rows = TokenCost.above(lm, site), [rows[0] for rows in batch.rows]
    kept = sum(len(row.ids) for row in rows) * cost.hidden
    sizes = [(len(row.ids), len(row.ids) - row.target) for row in rows]
    return cost.most_tokens(sizes, max_bytes - kept, WeightLoss.max_tokens)


def _per_token(cost: TokenCost, batch: TextBatch) -> Iterator[float]:
    """Yield the bytes per suffix token of each row in a pass with gradients."""
    yield from (cost.of_pass(row) / _suffix(row) for rows in batch.rows for row in rows)
    yield from (cost.of_pass(row, essence=True) for row in batch.essence)


class PeakMemory:
    """Peak memory of some devices beyond the memory in use at the start.

    Counts the memory of PyTorch's allocator on GPUs, and the resident memory of the process on the CPU: by the kernel's
    own mark under Linux, elsewhere, and where that mark cannot be reset, by twenty samples a second.

    Args:
        devices: Devices to measure.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self.gpus = [device for device in devices if device.type == "cuda"]
        self.sampler = None if self.gpus or _reset_mark() else _Sampler(self)
        self.base = float(sum(map(torch.cuda.memory_allocated, self.gpus)) if self.gpus else _resident())

    def restart(self) -> None:
        """Reset the peak."""
        for gpu in self.gpus:
            torch.cuda.reset_peak_memory_stats(gpu)
        if self.sampler is not None:
            self.sampler.peak = _resident()
        elif not self.gpus:
            _reset_mark()

    def bytes(self) -> float:
        """Return the peak since ``restart``, beyond the memory at the start."""
        if self.gpus:
            return sum(map(torch.cuda.max_memory_allocated, self.gpus)) - self.base
        return (_mark() if self.sampler is None else max(self.sampler.peak, _resident())) - self.base


class _Sampler(threading.Thread):
    """Keeps the largest resident memory since ``peak`` was set, as long as its owner lives."""

    def __init__(self, owner: PeakMemory) -> None:
        super().__init__(name="cakeflow memory", daemon=True)
        self.owner, self.peak = weakref.ref(owner), _resident()
        self.start()

    def run(self) -> None:
        while self.owner() is not None:
            if (now := _resident()) > self.peak:
                self.peak = now
            time.sleep(0.05)


def give_back() -> None:
    """Return freed memory to the system: the C library of Linux keeps what lies below something that is in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # glibc has it, musl has not
        trim(0)


def _resident() -> int:
    """Return the resident memory of the process in bytes."""
    return int(psutil.Process().memory_info().rss)


def _reset_mark() -> bool:
    """Reset the kernel's mark of the largest resident memory; False where there is none, or no right to."""
    try:
        RESET.write_text("5")
    except OSError:
        return False
    return True


def _mark() -> int:
    """Return the kernel's mark of the largest resident memory in bytes."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024
