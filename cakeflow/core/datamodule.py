"""Requests as Lightning data: edit batches to train on, records to validate on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from cakeflow.data.request import EditRequest
from cakeflow.data.schemas import parse_requests
from cakeflow.data.selection import Conflicts, Order, select
from cakeflow.data.snippets import with_references
from cakeflow.data.sources import read_entries
from cakeflow.errors import ConfigError, listed


class Records:
    """Requests of one batch; a plain class, because the Trainer takes dataclasses apart.

    Args:
        requests: The requests.
    """

    def __init__(self, requests: list[EditRequest]) -> None:
        self.requests = requests


class EditDataModule(L.LightningDataModule):
    """Data module that reads requests, selects some (see ``select``) and groups them into edit batches.

    The steps in sequence: read and check every entry; order or shuffle; drop conflicts; limit; batch.

    Args:
        source: Source as in ``read_requests``.
        batch_size: Edits in one batch: 1 edits fact by fact, None all in one batch.
        limit: Most requests to use.
        shuffle_seed: Seed of a shuffle before the limit; None keeps the order.
        eval_batch_size: Records scored together.
        split: Split of a data set that has several.
        order: Case ids of exactly the records to edit, in their sequence, or a file with them.
        conflicts: Treatment of records that contradict each other: ``error``, or ``drop`` all but the first.
        snippets: ``attribute_snippets.json`` of the official code, for ``Consistency`` (``snippets.with_references``).

    Raises:
        ConfigError: If a setting is out of its range, or names records that do not exist.
        RequestError: If a request is bad or contradicts another one that is edited. Everything is checked here, before
            any model is loaded.

    Example:
        >>> data = EditDataModule("builtin", batch_size=10, limit=25, shuffle_seed=1)
        >>> [len(batch.requests) for batch in data.train_dataloader()]
        [10, 10, 5]
    """

    def __init__(
        self,
        source: Any = "builtin",
        batch_size: int | None = None,
        limit: int | None = None,
        shuffle_seed: int | None = None,
        eval_batch_size: int = 16,
        split: str | None = None,
        order: Order | None = None,
        conflicts: Conflicts = "error",
        snippets: str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value is not None and value < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {value}")
        entries = read_entries(source, split)
        requests = parse_requests(with_references(entries, snippets) if snippets else entries)
        self.requests = select(requests, order, shuffle_seed, conflicts, limit)
        _warn_of_repetitions(self.requests)
        self.batch_size = batch_size or len(self.requests)
        self.eval_batch_size = eval_batch_size

    def train_dataloader(self) -> DataLoader[EditRequest]:
        """Return a loader of the edit batches, in order."""
        return self._loader(self.batch_size)

    def val_dataloader(self) -> DataLoader[EditRequest]:
        """Return a loader of the same records in batches for scoring."""
        return self._loader(self.eval_batch_size)

    def _loader(self, size: int) -> DataLoader[EditRequest]:
        return DataLoader(self.requests, batch_size=size, collate_fn=Records)  # type: ignore[arg-type]


def _warn_of_repetitions(requests: Sequence[EditRequest]) -> None:
    """Warn of requests that occur twice; no error, because published files and their tables have such."""
    first: dict[tuple[str, str, str], int] = {}
    edits = [(request.prompt, request.subject, request.target_new) for request in requests]
    repeated = [f"{i} (as {first[edit]})" for i, edit in enumerate(edits) if first.setdefault(edit, i) != i]
    if repeated:
        warnings.warn(
            f"records that repeat an earlier one, prompt, subject and target_new: {listed(repeated)} (numbered from 0, "
            "in the order of the edits); each counts once more in edit and metrics, leave it out if that is not meant",
            stacklevel=3,
        )
