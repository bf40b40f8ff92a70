"""A pass over a corpus in numbered blocks, whose exact sums are the same wherever and in whatever order they are made.

``sums_of`` sums some blocks, ``combine`` joins such sums, and a ``Course`` collects them up to the second moments. A
block has the same bits wherever it runs, with equal threads, because it is one forward pass over the same windows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from cakeflow import ranks
from cakeflow.errors import NumericalError, StatisticsError
from cakeflow.forward.corpus import PADDING
from cakeflow.forward.progress import progress_bar
from cakeflow.models.architecture import Site
from cakeflow.models.hooks import capture
from cakeflow.models.language import LanguageModel
from cakeflow.models.products import gram
from cakeflow.solvers.covariance import Covariance, rank_below
from cakeflow.solvers.exact_sum import MOST_TERMS, ExactSum, require_room
from cakeflow.storage.atomic import write_tensors
from cakeflow.storage.hashing import tensor_hashes
from cakeflow.storage.tensors import TensorFile, fault_in, read_tensors
from cakeflow.storage.typed import SHA256, Count, Number, Schema

log = logging.getLogger(__name__)
SAVE_EVERY = 30.0
"""Seconds between saves of what a pass has so far."""
PARTS = (2, 4, 8)
"""The curve has a point behind a half, a quarter and an eighth of the corpus; few, because ranks meet there."""
REMEDY = "delete it, and it is collected again"
At = Literal["tokens", "names"]
Sums = dict[str, ExactSum]
"""Label of a site -> sum of k k^T over some blocks."""


class Plan(Schema):
    """A pass: how the corpus is parted into blocks, and at which of them the curve of a second moment has points.

    Attributes:
        key: Hash of what decides the values: weights, tokens and types.
        windows: Number of windows of the corpus.
        rows: Windows of a block; the last one may have fewer.
        length: Keys of a window.
        threshold: Eigenvalues below it are counted for the curve.
        widths: Label of a site -> width of its keys.
    """

    key: SHA256
    windows: Count
    rows: Count
    length: Count
    threshold: Number
    widths: dict[str, Count]

    def __len__(self) -> int:
        """Number of blocks."""
        return -(-self.windows // self.rows)

    def tokens(self, end: int) -> int:
        """Return the number of keys in the blocks before ``end``."""
        return min(end * self.rows, self.windows) * self.length

    def ends(self) -> list[int]:
        """Return the blocks behind which the curve has a point, ascending: about an eighth, a quarter, half, all.

        None is where there are fewer keys than they are wide, because C is singular there.
        """
        least = max(self.widths.values()) / self.length  # windows
        points = [-(-self.windows // part) for part in PARTS if self.windows >= least * part]
        return sorted({len(self), *(end for point in points if (end := -(-point // self.rows)) < len(self))})

    def blocks(self, number: int = 1, count: int = 1) -> range:
        """Return the blocks of one of ``count`` parts of about equal size, from 1 on."""
        return range(len(self) * (number - 1) // count, len(self) * number // count)

    def stretches(self, blocks: range) -> list[range]:
        """Return some blocks, parted where the curve has points."""
        cuts = [blocks.start, *(end for end in self.ends() if blocks.start < end < blocks.stop), blocks.stop]
        return [range(low, high) for low, high in pairwise(cuts)]

    def check(self) -> None:
        """Check that the sums have room for all blocks.

        Raises:
            StatisticsError: If there are too many.
        """
        if len(self) > MOST_TERMS:
            least = -(-self.windows // MOST_TERMS) * self.length
            raise StatisticsError(
                f"statistics of {len(self)} blocks, and the sums have room for {MOST_TERMS}; raise "
                f"statistics.batch_tokens to at least {least}, or read fewer tokens"
            )


@dataclass(frozen=True, eq=False)
class Corpus:
    """The numbered blocks of a model's pass.

    Attributes:
        lm: The model.
        sites: The projections whose inputs are the keys.
        windows: Rows of tokens.
        at: Which keys count.
        plan: How the windows are parted.
    """

    lm: LanguageModel
    sites: Sequence[Site]
    windows: Int[Tensor, "windows window"]
    at: At
    plan: Plan

    def of(self, sites: Sequence[Site]) -> Corpus:
        """Return the blocks for some of the sites."""
        plan = self.plan.model_copy(update={"widths": {label_of(site): self.lm.key_width(site) for site in sites}})
        return replace(self, sites=sites, plan=plan)

    @torch.no_grad()
    def block(self, number: int) -> Iterator[tuple[str, Float[Tensor, "d_in d_in"]]]:
        """Yield the sum of k k^T over one block for each site; the forward pass stops after the last layer."""
        rows = self.plan.rows
        ids = self.windows[number * rows : (number + 1) * rows].to(self.lm.device)
        last = (ids != PADDING).sum(1) - 1
        ids = ids.clamp_min(0)  # what is padded is behind all that is read
        ordered = sorted(self.sites, key=lambda site: site.layer)
        with capture(self.lm, ordered, side="in", stop=True) as inputs:
            self.lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        for site in ordered:
            keys = inputs[site]
            keys = (
                keys[range(len(ids)), last]
                if self.at == "names"
                else rearrange(keys, "rows window width -> (rows window) width")
            )
            keys = keys if keys.dtype == torch.float64 else keys.float()
            yield label_of(site), gram(keys)


def sums_of(corpus: Corpus, blocks: Iterable[int], sums: Sums | None = None) -> Sums:
    """Return the sums over some blocks, in whatever order.

    Args:
        corpus: The blocks.
        blocks: Their numbers, each once.
        sums: Sums to which they are added, in place; by default new ones.

    Raises:
        StatisticsError: If a sum is not finite or too large.
    """
    sums = {} if sums is None else sums
    for number in blocks:
        for label, term in corpus.block(number):
            if label not in sums:
                sums[label] = ExactSum.zeros(len(term), term.device)
            try:
                sums[label].add(term)
            except NumericalError as error:
                raise _unusable(label, error) from error
    return sums


def combine(parts: Iterable[Mapping[str, ExactSum]], sums: Sums | None = None) -> Sums:
    """Return the sums over all blocks of some parts, which are in whatever order.

    Args:
        parts: Sums over blocks that no other part has.
        sums: Sums to which they are added, in place; by default new ones.

    Raises:
        StatisticsError: If a sum is too large.
    """
    sums = {} if sums is None else sums
    for part in parts:
        for label, each in part.items():
            if label not in sums:
                sums[label] = ExactSum.zeros(len(each), each.words.device)
            try:
                sums[label].join(each)
            except NumericalError as error:
                raise _unusable(label, error) from error
    return sums


def _unusable(label: str, error: NumericalError) -> StatisticsError:
    return StatisticsError(
        f"{label}: the second moment {error}; load the model in bfloat16 or float32, or edit another layer"
    )


@dataclass
class Course:
    """How far a pass is.

    Attributes:
        plan: The pass.
        done: Number of blocks that are summed, from the first on.
        sums: Their sums.
        earlier: C at the last point of the curve, on the CPU.
        curve: Points of ``Covariance.curve``.
    """

    plan: Plan
    done: int = 0
    sums: Sums = field(default_factory=dict)
    earlier: dict[str, Float[Tensor, "d_in d_in"]] = field(default_factory=dict)
    curve: dict[str, Float[Tensor, "points 4"]] = field(default_factory=dict)

    def reach(self, end: int) -> None:
        """Set what is done: the sums have all blocks before ``end``. A point of the curve that is there is noted.

        The last point is noted by ``finish``, with the eigenbasis.
        """
        self.done = end
        moments = {label: self.moment(label) for label in self.plan.widths if end in self.plan.ends()[:-1]}
        counts = ranks.spread([*moments.values()], lambda each: rank_below(each.float(), self.plan.threshold))
        for (label, moment), null in zip(moments.items(), counts, strict=True):
            self._note(label, moment, null)

    def moment(self, label: str) -> Float[Tensor, "d_in d_in"]:
        """Return C so far, on the CPU."""
        return (self.sums[label].value() / self.plan.tokens(self.done)).cpu()

    def _note(self, label: str, moment: Tensor, null: int) -> None:
        """Append a point to the curve of a site: the change of C, and ``null`` eigenvalues below the threshold."""
        before = self.earlier.get(label, torch.zeros_like(moment))
        norm = torch.linalg.matrix_norm(moment).clamp_min(torch.finfo(moment.dtype).tiny)
        change = float(torch.linalg.matrix_norm(moment - before) / norm)
        numbers = [self.plan.tokens(self.done), change, self.plan.threshold, null]
        point = torch.tensor([numbers], dtype=torch.float64)
        self.curve[label] = torch.cat([self.curve.get(label, point[:0]), point])
        self.earlier[label] = moment

    def save(self, path: Path) -> None:
        """Write how far the pass is."""
        sums = {label: each.words for label, each in self.sums.items()}
        groups: dict[str, Mapping[str, Tensor]] = {"sum": sums, "earlier": self.earlier, "curve": self.curve}
        tensors = {f"{group}/{label}": each for group, parts in groups.items() for label, each in parts.items()}
        tensors |= {"done": torch.tensor(self.done), "rows": torch.tensor(self.plan.rows)}
        write_tensors(path, tensors, tensor_hashes(tensors))

    @classmethod
    def resume(cls, path: Path, plan: Plan, device: torch.device) -> Course:
        """Load how far a pass was when it was interrupted; nothing if it was one over other sites or blocks.

        Raises:
            StatisticsError: If the file is damaged, or the numbers in it cannot be those of this pass.
        """
        if not path.exists():
            return cls(plan)
        file = read_moments(path)
        groups = {name.partition("/")[0] for name in file.tensors}
        same = all(f"sum/{label}" in file.tensors for label in plan.widths)
        same = same and int(file.tensors.get("rows", torch.tensor(plan.rows)).sum()) == plan.rows
        shapes: dict[str, tuple[int, ...]] = {"done": (), "rows": ()}
        for label, width in plan.widths.items() if same else ():
            shapes[f"sum/{label}"] = (width + 1, width)
            if "earlier" in groups:
                shapes |= {f"earlier/{label}": (width, width), f"curve/{label}": curve_shape(file, f"curve/{label}")}
        if fault := fault_in(file, shapes):
            raise damaged(path, fault)
        if not same:
            return cls(plan)
        if fault := next(filter(None, (not_whole(file, f"sum/{label}") for label in plan.widths)), ""):
            raise damaged(path, fault)
        done = int(file.tensors["done"])
        if not 0 < done <= len(plan):
            raise damaged(path, f"sums of {done} blocks out of {len(plan)}")
        log.info("second moments: resuming after %d of %d blocks", done, len(plan))
        sums, earlier, curve = (
            {label: file.tensors[name] for label in plan.widths if (name := f"{group}/{label}") in file.tensors}
            for group in ("sum", "earlier", "curve")
        )
        return cls(plan, done, {label: ExactSum(each.to(device), done) for label, each in sums.items()}, earlier, curve)

    def finish(self, home: Path) -> None:
        """Write the second moment of each site with its eigenbasis, and how it settled; ranks make some sites each."""
        with progress_bar(len(self.plan.widths), "eigenbases", "layer") as bar:

            def run(label: str) -> None:
                self._finish(home / f"{label}.safetensors", label)
                bar.update()

            ranks.spread([*self.plan.widths], run)

    def _finish(self, path: Path, label: str) -> None:
        moment = self.moment(label)
        values, vectors = Covariance(moment).eigen
        self._note(label, moment, int((values < self.plan.threshold).sum()))
        change = 100 * float(self.curve[label][-1, 1])
        log.info("second moments: %s changed by %.2f %% since half of the tokens were read", label, change)
        tensors = {"moment": moment, "eigenvalues": values, "eigenvectors": vectors.T, "curve": self.curve[label]}
        write_tensors(path, tensors, tensor_hashes(tensors))


def pass_over(corpus: Corpus, home: Path) -> None:
    """Collect second moments in one pass over all blocks; an interrupted one is resumed.

    Ranks share the blocks between two points of the curve, and the eigenbases.

    Args:
        corpus: The blocks.
        home: Folder of the files.

    Raises:
        StatisticsError: If a sum is not finite or too large, or what an interrupted pass left is damaged.
    """
    plan, path = corpus.plan, home / "partial.safetensors"
    course = Course.resume(path, plan, corpus.lm.device)
    saved = time.monotonic()
    with progress_bar(plan.tokens(len(plan)), "second moments", "token", initial=plan.tokens(course.done)) as bar:
        for blocks in _rounds(plan, course.done):
            _add_blocks(corpus, blocks, course.sums)
            course.reach(blocks.stop)
            bar.update(plan.tokens(blocks.stop) - plan.tokens(blocks.start))
            if ranks.is_first() and time.monotonic() - saved > SAVE_EVERY:
                course.save(path)
                saved = time.monotonic()
    course.finish(home)
    ranks.on_first(lambda: path.unlink(missing_ok=True))


def _rounds(plan: Plan, done: int) -> Iterator[range]:
    """Yield the blocks that are summed at a time: one, or with several ranks all up to the curve's next point."""
    for stretch in plan.stretches(range(done, len(plan))):
        size = 1 if ranks.world_size() == 1 else max(1, len(stretch))
        yield from (range(at, min(at + size, stretch.stop)) for at in range(stretch.start, stretch.stop, size))


def _add_blocks(corpus: Corpus, blocks: range, sums: Sums) -> None:
    """Add the sums over some blocks in place; of several ranks each runs its part, and all have the result."""
    size = ranks.world_size()
    if size == 1:
        sums_of(corpus, blocks, sums)
        return
    own = {label: ExactSum.zeros(width, corpus.lm.device) for label, width in corpus.plan.widths.items()}

    def run(part: range) -> dict[str, int]:
        return {label: each.largest for label, each in sums_of(corpus, part, own).items()}

    largest = ranks.spread([blocks[place::size] for place in range(size)], run)
    for label, each in own.items():
        try:
            require_room(sum(part[label] for part in largest))
        except NumericalError as error:
            raise _unusable(label, error) from error
        ranks.add_up(each.words, f"second moments of {label}")
        each.count = len(blocks)
    combine([own], sums)


def label_of(site: Site) -> str:
    """Return the name of a site in files."""
    return f"layer-{site.layer}-{site.role}"


def read_moments(path: Path, remedy: str = REMEDY) -> TensorFile:
    """Read a file of second moments or sums.

    Raises:
        StatisticsError: If it cannot be read.
    """
    return read_tensors(path, f"{path} is damaged: it", StatisticsError, remedy)


def damaged(path: Path, reason: object, remedy: str = REMEDY) -> StatisticsError:
    """Return the error that a file is damaged."""
    return StatisticsError(f"{path} is damaged ({reason}); {remedy}")


def not_whole(file: TensorFile, name: str) -> str:
    """Return what is wrong with the type of a sum's words; empty if nothing is."""
    return "" if file.tensors[name].dtype == torch.int64 else f"{name} holds no whole numbers"


def curve_shape(file: TensorFile, name: str) -> tuple[int, int]:
    """Return the shape of a curve with as many points as the file's."""
    return len(file.tensors[name]) if name in file.tensors and file.tensors[name].dim() else 0, 4
