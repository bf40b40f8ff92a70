"""Second moments by independent jobs: each sums a part of the blocks into a folder, and ``merge`` joins the folders.

A file has the exact sums over some blocks that follow each other, and says of what pass they are. Three jobs merged
give the bits of one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cakeflow.core.moments import (
    SAVE_EVERY,
    Corpus,
    Course,
    Plan,
    Sums,
    combine,
    damaged,
    not_whole,
    read_moments,
    sums_of,
)
from cakeflow.core.statistics import home_of
from cakeflow.errors import ConfigError, StatisticsError, listed
from cakeflow.forward.progress import progress_bar
from cakeflow.solvers.exact_sum import ExactSum
from cakeflow.storage.atomic import write_tensors
from cakeflow.storage.cache import content_key, require_writable
from cakeflow.storage.hashing import tensor_hashes
from cakeflow.storage.locks import locked
from cakeflow.storage.tensors import fault_in
from cakeflow.storage.typed import parse_as

REMEDY = "delete it, and run its part again"
PARTIAL = "partial.safetensors"
"""File of blocks that are not all done, beside those that are."""


@dataclass(frozen=True)
class Part:
    """One of several jobs: ``2/3`` is the second of three.

    Attributes:
        number: Number of the part, from 1 on.
        count: Number of parts.
    """

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Part:
        """Return the part that a text such as ``2/3`` names.

        Raises:
            ConfigError: If it names none.
        """
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ConfigError(f"part must be a number of so many, such as 1/3, 2/3 and 3/3; got {text!r}")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class SumFile:
    """A file of sums, as its header describes it.

    Attributes:
        path: The file.
        plan: The pass.
        blocks: Blocks that are summed.
        part: The job that wrote it.
    """

    path: Path
    plan: Plan
    blocks: range
    part: Part

    def write(self, sums: Sums) -> None:
        """Write the sums, and what they are sums of."""
        tensors = {label: each.words for label, each in sums.items()}
        notes = {"plan": self.plan.model_dump_json(), "blocks": _span(self.blocks), "part": str(self.part)}
        write_tensors(self.path, tensors, {**tensor_hashes(tensors), **notes, "seal": content_key(notes)})

    @classmethod
    def read(cls, path: Path) -> SumFile:
        """Read the header of a file; its tensors are not looked at.

        Raises:
            StatisticsError: If the file is damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = dict(file.metadata() or {})
        except (OSError, SafetensorError) as error:
            raise damaged(path, error, REMEDY) from error
        notes = {name: header.get(name, "") for name in ("plan", "blocks", "part")}
        if header.get("seal") != content_key(notes):
            raise damaged(path, "its header is not as it was written", REMEDY)
        plan = parse_as(Plan, notes["plan"], f"{path} is damaged: plan", StatisticsError, REMEDY)
        start, stop = map(int, notes["blocks"].split("-"))
        return cls(path, plan, range(start, stop), Part.parse(notes["part"]))

    def sums(self, device: torch.device | str = "cpu") -> Sums:
        """Read the sums.

        Raises:
            StatisticsError: If the file is damaged.
        """
        file = read_moments(self.path, REMEDY)
        shapes = {label: (width + 1, width) for label, width in self.plan.widths.items()}
        fault = fault_in(file, shapes) or "".join(not_whole(file, label) for label in shapes)
        if fault:
            raise damaged(self.path, fault, REMEDY)
        return {label: ExactSum(file.tensors[label].to(device), len(self.blocks)) for label in shapes}


def collect_part(corpus: Corpus, part: Part, folder: Path) -> list[Path]:
    """Sum the blocks of one part in a folder; what an interrupted job has done is not done again.

    Args:
        corpus: All blocks.
        part: The part.
        folder: Its folder.

    Returns:
        The files, for ``merge``.

    Raises:
        ConfigError: If there are more parts than blocks.
        StatisticsError: If the folder has sums of something else or a damaged file, or a sum cannot be made.
        LockedError: If another process writes the folder.
    """
    plan = corpus.plan
    if part.count > len(plan):
        raise ConfigError(f"part {part}: the corpus has {len(plan)} blocks; make at most as many parts")
    blocks = plan.blocks(part.number, part.count)
    files = [SumFile(folder / f"blocks-{_span(each)}.safetensors", plan, each, part) for each in plan.stretches(blocks)]
    require_writable(folder)
    with locked(folder):
        for file in _files(folder):
            if (file.plan, file.part) != (plan, part):
                raise StatisticsError(
                    f"{file.path} has sums of part {file.part} of {_difference(plan, file.plan) or 'this pass'}; "
                    "give another folder: --out FOLDER"
                )
        with progress_bar(
            plan.tokens(blocks.stop) - plan.tokens(blocks.start), f"second moments, part {part}", "token"
        ) as bar:
            for file in files:
                _collect(corpus, file, bar)
    return [file.path for file in files]


def _collect(corpus: Corpus, file: SumFile, bar: Any) -> None:
    """Write the sums of a file, going on from what is there of them."""
    tokens, partial = corpus.plan.tokens, file.path.with_name(PARTIAL)
    if file.path.exists():
        file.sums()  # or a damaged one would come out at the end, in ``merge``
        bar.update(tokens(file.blocks.stop) - tokens(file.blocks.start))
        return
    sums: Sums = {}
    start = file.blocks.start
    if partial.exists() and (earlier := SumFile.read(partial)).blocks.start == start:
        sums, start = earlier.sums(corpus.lm.device), earlier.blocks.stop
        bar.update(tokens(start) - tokens(file.blocks.start))
    saved = time.monotonic()
    for number in range(start, file.blocks.stop):
        sums_of(corpus, [number], sums)
        bar.update(tokens(number + 1) - tokens(number))
        if time.monotonic() - saved > SAVE_EVERY:
            replace(file, path=partial, blocks=range(file.blocks.start, number + 1)).write(sums)
            saved = time.monotonic()
    file.write(sums)
    partial.unlink(missing_ok=True)


def merge(folders: Sequence[Path], cache: Path | None = None) -> Path:
    """Join the sums of all parts to second moments, where ``Statistics.collect`` looks for them.

    Files are read one at a time, so that memory is that of a pass.

    Args:
        folders: Folders of the parts, in any order.
        cache: Folder of the statistics of all models; by default below ``cache_folder()``.

    Returns:
        Folder of the second moments.

    Raises:
        StatisticsError: If a part is missing or unfinished, is there twice, is of another pass, or has a damaged file.
    """
    files = sorted(_all_files(folders), key=lambda file: (file.blocks.start, file.blocks.stop))
    _require_one_pass(files)
    _require_all_blocks(files)
    plan = files[0].plan
    home = require_writable(home_of(plan.key, cache))
    with locked(home, wait=True):
        course = Course(plan)
        with progress_bar(plan.tokens(len(plan)), "second moments", "token") as bar:
            for file in files:
                combine([file.sums()], course.sums)
                course.reach(file.blocks.stop)
                bar.update(plan.tokens(file.blocks.stop) - plan.tokens(file.blocks.start))
        course.finish(home)
    return home


def _all_files(folders: Sequence[Path]) -> Iterator[SumFile]:
    """Yield the files of all folders; a folder that is named twice counts once."""
    for folder in dict.fromkeys(each.resolve() for each in folders):
        files = list(_files(folder)) if folder.is_dir() else []
        done = [file for file in files if file.path.name != PARTIAL]
        if not done and not files:
            raise StatisticsError(f"{folder} has no sums; name the folders that cakeflow statistics --part wrote")
        yield from done


def _files(folder: Path) -> Iterator[SumFile]:
    """Yield the files in the folder of a part."""
    paths = [path for pattern in ("blocks-*.safetensors", PARTIAL) for path in sorted(folder.glob(pattern))]
    return (SumFile.read(path) for path in paths)


def _require_one_pass(files: Sequence[SumFile]) -> None:
    for file in files:
        if reason := _difference(files[0].plan, file.plan):
            raise StatisticsError(
                f"{file.path} does not go with {files[0].path}: it is of {reason}; leave it out, or run its part "
                "again with the model, texts and settings of the others"
            )


def _difference(plan: Plan, other: Plan) -> str:
    """Return how another pass differs, in words; empty if it does not."""
    reasons = {
        "key": "another model, type of weights or corpus",
        "rows": f"blocks of {other.rows} windows, not {plan.rows} (statistics.batch_tokens)",
        "threshold": f"the threshold {other.threshold}, not {plan.threshold} (statistics.null_threshold)",
        "widths": f"{listed([*other.widths])}, not {listed([*plan.widths])}",
    }
    return next((text for name, text in reasons.items() if getattr(plan, name) != getattr(other, name)), "")


def _require_all_blocks(files: Sequence[SumFile]) -> None:
    """Check that every block is in one file, of those sorted by their blocks."""
    if not files:
        raise StatisticsError("no part is finished; run each with the command that began it")
    for one, other in pairwise(files):
        if other.blocks.start < one.blocks.stop:
            raise StatisticsError(
                f"{one.path} and {other.path} both have block {other.blocks.start}; leave out one of them (parts "
                f"{one.part} and {other.part})"
            )
    plan, count = files[0].plan, files[0].part.count
    ends = [0, *(file.blocks.stop for file in files)]
    starts = [*(file.blocks.start for file in files), len(plan)]
    gaps = [range(low, high) for low, high in zip(ends, starts, strict=True) if low < high]
    if gaps:
        missing = [Part(number, count) for number in range(1, count + 1) if _meets(plan.blocks(number, count), gaps)]
        raise StatisticsError(
            f"blocks {listed([f'{gap.start} to {gap.stop - 1}' for gap in gaps])} of {len(plan)} are in none of the "
            f"folders: part {listed(missing)} is missing or not finished; name its folder, or run it to its end, "
            f"cakeflow statistics --part {missing[0]} with the options of the others"
        )


def _meets(blocks: range, others: Sequence[range]) -> bool:
    return any(max(blocks.start, each.start) < min(blocks.stop, each.stop) for each in others)


def _span(blocks: range) -> str:
    """Return some blocks as files have them: the first one, and the one behind the last."""
    return f"{blocks.start}-{blocks.stop}"
