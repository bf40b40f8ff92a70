"""Requests as Lightning data: edit batches to train on, records to validate on."""

from __future__ import annotations

import random
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from cakeflow.data.readers import read_requests
from cakeflow.errors import ConfigError
from cakeflow.request import EditRequest


class Records:
    """Requests on their way through the Trainer, which passes on what it does not know (it takes dataclasses apart).

    Args:
        requests: The requests of one batch.
    """

    def __init__(self, requests: list[EditRequest]) -> None:
        self.requests = requests


class EditDataModule(L.LightningDataModule):
    """Feeds requests to an ``EditModule``.

    Args:
        source: See ``read_requests``.
        batch_size: Edits in one batch; None puts all in one.
        limit: Use only the first so many requests.
        shuffle_seed: Shuffle before limiting, with this seed; None keeps the order.
        eval_batch_size: Records scored together.

    Raises:
        RequestError: If a request is bad; the whole list is checked here, before any model is loaded.
    """

    def __init__(
        self,
        source: Any = "builtin",
        batch_size: int | None = None,
        limit: int | None = None,
        shuffle_seed: int | None = None,
        eval_batch_size: int = 16,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("limit", limit), ("eval_batch_size", eval_batch_size)):
            if value is not None and value < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {value}")
        requests = read_requests(source)
        if shuffle_seed is not None:
            random.Random(shuffle_seed).shuffle(requests)
        self.requests = requests[:limit]
        self.batch_size = batch_size or len(self.requests)
        self.eval_batch_size = eval_batch_size

    def train_dataloader(self) -> DataLoader[EditRequest]:
        """Edit batches, in order."""
        return self._loader(self.batch_size)

    def val_dataloader(self) -> DataLoader[EditRequest]:
        """The same records, to be scored."""
        return self._loader(self.eval_batch_size)

    def _loader(self, size: int) -> DataLoader[EditRequest]:
        return DataLoader(self.requests, batch_size=size, collate_fn=Records)  # type: ignore[arg-type]
