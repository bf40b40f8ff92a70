"""Facts in force: those that were neither taken back nor replaced by later ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

Batch = tuple[int, Sequence[str], Mapping[str, Sequence[str]]]
"""Number of a batch, hashes of its facts, and, fact by fact, the hashes of the earlier ones that it replaced."""


def out_of_force(batches: Sequence[Batch], undone: Collection[tuple[int, str]]) -> list[set[str]]:
    """Return for each batch the hashes of its facts that are out of force.

    A fact that is taken back gives its place to those that it replaced: they are in force again.

    Args:
        batches: The batches, oldest first.
        undone: Batch and hash of every fact that was taken back alone.

    Example:
        >>> batches = [(0, ["a", "b"], {}), (1, ["c"], {"c": ["a"]})]
        >>> out_of_force(batches, [])
        [{'a'}, set()]
        >>> out_of_force(batches, [(1, "c")])
        [set(), {'c'}]
    """
    gone, replaced = list[set[str]](), set[str]()
    for number, hashes, replacing in reversed(batches):
        taken_back = {each for each in hashes if (number, each) in undone}
        gone.append(taken_back | replaced.intersection(hashes))
        replaced.update(old for new, earlier in replacing.items() if new not in taken_back for old in earlier)
    return gone[::-1]
