"""Which earlier edits a side memory rehearses while it learns another one."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cakeflow_sidememory.learning import Rehearsal
from cakeflow_sidememory.shards import ShardSettings


def shard_ranges(edits: int, settings: ShardSettings) -> list[range]:
    """Return the numbers of the edits of each shard, joined ones as one; the last is the shard that is written."""
    if settings.control == "always":
        return [range(edits)]
    every, joined = settings.save_every, edits - edits % settings.join_every
    written = edits - edits % every
    whole = [range(start, start + settings.join_every) for start in range(0, joined, settings.join_every)]
    return [*whole, *(range(start, start + every) for start in range(joined, written, every)), range(written, edits)]


class Rehearsals:
    """The edits of a stream as later ones rehearse them, by their number; each is read when it is first needed.

    WISE (arXiv 2405.14768, App. B.3; its code, ``replay``): at every step one edit of each other shard, in turn, and a
    random one of the shard that is written, which may be the edit itself. Nothing is rehearsed in the first shard.

    Args:
        read: Returns the edit of a number.
    """

    def __init__(self, read: Callable[[int], Rehearsal]) -> None:
        self._read, self._known = read, dict[int, Rehearsal]()

    def keep(self, number: int, edit: Rehearsal) -> None:
        """Keep an edit under its number; those behind it are forgotten, as they were taken back."""
        self._known = {each: kept for each, kept in self._known.items() if each < number} | {number: edit}

    def draw(
        self, number: int, settings: ShardSettings, steps: int, seed: int
    ) -> tuple[list[list[Rehearsal]], list[Rehearsal]]:
        """Return the edits of each other shard, and one of the shard that is written for each step.

        Args:
            number: The edit that is to be learned, which is kept already.
            settings: When shards end and are joined.
            steps: Number of steps.
            seed: Seed of the run.
        """
        *others, written = shard_ranges(number, settings)
        if not others:
            return [], []
        generator = torch.Generator().manual_seed((1_000_003 * seed + number) % 2**63)
        places = torch.randint(written.start, number + 1, (steps,), generator=generator).tolist()
        return [[self._of(each) for each in shard] for shard in others], [self._of(each) for each in places]

    def _of(self, number: int) -> Rehearsal:
        if number not in self._known:
            self._known[number] = self._read(number)
        return self._known[number]
