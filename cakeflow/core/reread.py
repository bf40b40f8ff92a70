"""Keys of earlier facts, read again in the model as it is: edits of lower layers move them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from cakeflow.errors import ConfigError, require_count
from cakeflow.forward.keys import read_keys
from cakeflow.journal.steps import EditStep
from cakeflow.models.architecture import Site

if TYPE_CHECKING:
    from cakeflow.core.locate_then_edit import LocateThenEdit


def checked_interval(batches: int, *, history: bool) -> int:
    """Return the number of batches after which keys are read again; 0 is never.

    Raises:
        ConfigError: If it is no whole number from 0, or there is no history to read again.
    """
    require_count("reread_keys", batches)
    if batches and not history:
        raise ConfigError(f"reread_keys={batches} reads the history's keys again: set history: true, or reread_keys: 0")
    return batches


def renew_keys(module: LocateThenEdit) -> None:
    """Have the history hold keys as they were when the journal's last full ``reread_keys`` batches were complete.

    They depend on the journal's batches alone: where the model has gone on since, as when a run is resumed, it is put
    back for the reading. So nothing is stored, and a resumed run solves with the same bits.
    """
    journal, every = module.journal, module.reread_keys
    count = len(journal)
    behind = journal.steps[: count - count % every] if every else []
    if journal.histories.is_renewed_behind(behind):
        return
    with module.phase("keys"), nullcontext() if len(behind) == count else journal.reverted(behind):
        keys = present_keys(module, behind)
    journal.histories.renew(keys, behind, journal.steps)


def present_keys(module: LocateThenEdit, steps: Sequence[EditStep]) -> dict[str, dict[int, Float[Tensor, "n d_in"]]]:
    """Read the keys of all facts of some batches in the model as it is, in one climb.

    Args:
        module: The edit method; its contexts are those of the keys.
        steps: The batches.

    Returns:
        Name of each edited weight -> number of a batch -> its keys, one row for each that it recorded.

    Raises:
        ConfigError: If the texts of a batch were not stored, or its facts would be written at other tokens today.
    """
    edits = [step for step in steps if step.hashes]
    if bare := [str(step.number) for step in edits if not step.requests]:
        raise ConfigError(
            f"the keys of batches {', '.join(bare)} cannot be read again, because their texts were not stored; set "
            "reread_keys: 0, or load a run with texts"
        )
    texts = module.encode([request for step in edits for request in step.requests])
    with module.journal.reverted():
        facts = module.with_tokens(texts)
    sites = [Site(layer, module.site) for layer in module.layers]
    keys = read_keys(module.lm, facts.texts, sites, module.pass_tokens)
    rows = _rows(edits, facts.owners)
    return {module.lm.weight_name(site): {n: each[part] for n, part in rows.items()} for site, each in keys.items()}


def _rows(steps: Sequence[EditStep], owners: Sequence[int]) -> dict[int, slice]:
    """Number of a batch -> the rows of its facts; ``owners`` has the place of each row's request among all of them."""
    rows, first = dict[int, slice](), 0
    for step in steps:
        start, end = bisect_left(owners, first), bisect_left(owners, first + len(step.requests))
        if [each - first for each in owners[start:end]] != (step.owners or [*range(len(step.requests))]):
            raise ConfigError(
                f"the keys of batch {step.number} cannot be read again: its facts were written at other tokens, or in "
                "other contexts, than this module's; set reread_keys: 0, or contexts and fact_token as they were"
            )
        rows[step.number], first = slice(start, end), first + len(step.requests)
    return rows
