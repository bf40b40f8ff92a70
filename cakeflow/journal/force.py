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
    replaced = replaced_by(batches, undone)
    return [
        {each for each in hashes if (number, each) in undone} | by.keys()
        for (number, hashes, _), by in zip(batches, replaced, strict=True)
    ]


def replaced_by(batches: Sequence[Batch], undone: Collection[tuple[int, str]]) -> list[dict[str, int]]:
    """Return for each batch the hashes of its facts that a later batch replaced, with the number of that batch.

    Args:
        batches: As for ``out_of_force``.
        undone: As for ``out_of_force``.

    Example:
        >>> replaced_by([(0, ["a", "b"], {}), (1, ["c"], {"c": ["a"]})], [])
        [{'a': 1}, {}]
    """
    by, replaced = dict[str, int](), list[dict[str, int]]()
    for number, hashes, replacing in reversed(batches):
        replaced.append({each: by[each] for each in hashes if each in by})
        taken_back = {each for each in hashes if (number, each) in undone}
        by |= {old: number for new, earlier in replacing.items() if new not in taken_back for old in earlier}
    return replaced[::-1]
