"""Requests as Lightning data: edit batches to train on, requests to validate on."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from cakeflow.core.module import EditModule
from cakeflow.data.images import ImageEditRequest
from cakeflow.data.request import EditRequest
from cakeflow.data.review import warn_of_doubts
from cakeflow.data.schemas import ZsreTarget, asks, parse_requests
from cakeflow.data.selection import Conflicts, Order, require_apart, select
from cakeflow.data.snippets import with_references
from cakeflow.data.sources import Source, read_entries
from cakeflow.data.text import Occurrence
from cakeflow.errors import ConfigError, require_count
from cakeflow.forward.tokens import EditBatch


class EditDataModule(L.LightningDataModule):
    """Reads requests, chooses some (see ``selection.select``), checks them once, and yields edit batches.

    What can be edited but is probably not meant as it stands is named by a ``RequestWarning`` (``review``).

    The sequence of the steps: read and check every entry; order or shuffle; drop conflicts; limit. When a Trainer takes
    it: load the model, tokenize all requests, split them into batches.

    Args:
        source: Requests, or where they are; see ``read_requests``.
        batch_size: Edits in one batch, the batches one after another: 1 edits fact by fact, None all in one batch.
        limit: Number of requests to use, from the first.
        shuffle_seed: Seed of a shuffle before limiting; None keeps the order.
        eval_batch_size: Requests scored together.
        split: Split of a data set that has several.
        order: Case ids of exactly the requests to edit, in their sequence, or a file with them.
        conflicts: What to do about requests that contradict each other: ``error``, ``drop`` all but the first,
            or ``keep`` them in a stream in which the later one replaces the earlier one; not in one batch.
        snippets: ``attribute_snippets.json`` of the official code, for ``Consistency`` (``snippets.with_references``).
        occurrence: Occurrence of its subject that a prompt without ``{}`` means, ``first`` or ``last``
            (``parse_requests``).
        zsre_target: Field of zsRE's records with the new target, ``answers`` or ``alt`` (``parse_requests``).

    Raises:
        ConfigError: If a setting is out of its range, or names requests that are not there.
        RequestError: If a request is bad or contradicts another one that is edited; no model is loaded yet.

    Example:
        >>> data = EditDataModule("builtin", batch_size=10, limit=25, shuffle_seed=1)
        >>> len(data.requests), [len(batch) for batch in data.val_dataloader()]
        (25, [16, 9])
    """

    def __init__(
        self,
        source: Source = "builtin",
        batch_size: int | None = None,
        limit: int | None = None,
        shuffle_seed: int | None = None,
        eval_batch_size: int = 16,
        split: str | None = None,
        order: Order | None = None,
        conflicts: Conflicts = "error",
        snippets: str | None = None,
        occurrence: Occurrence | None = None,
        zsre_target: ZsreTarget = "answers",
    ) -> None:
        super().__init__()
        require_count("data.batch_size", batch_size, 1, optional=True)
        require_count("data.eval_batch_size", eval_batch_size, 1)
        entries = read_entries(source, split)
        entries = list(with_references(entries, snippets)) if snippets else entries
        requests = parse_requests(entries, occurrence=occurrence, zsre_target=zsre_target)
        self.requests = select(requests, order, shuffle_seed, conflicts, limit)
        may_ask = {request for entry, request in zip(entries, requests, strict=True) if asks(entry)}
        texts = [each for each in self.requests if not isinstance(each, ImageEditRequest)]
        warn_of_doubts(texts, may_ask, may_contradict=conflicts == "keep")
        self.batch_size = int(batch_size or len(self.requests))  # a NumPy number is none for JSON
        if conflicts == "keep":
            require_apart(self.requests, self.batch_size)
        self.eval_batch_size = int(eval_batch_size)
        self.evaluate = True
        self._module: EditModule | None = None
        self._batches: list[EditBatch] = []
        self._checked = False

    def setup(self, stage: str) -> None:
        """Make requests and model ready for each other, if they are not yet."""
        module: Any = self.trainer.lightning_module  # type: ignore[union-attr]
        self.attach(module, edit=stage == "fit", evaluate=self.evaluate)

    def attach(self, module: EditModule, *, edit: bool, evaluate: bool) -> None:
        """Load the module's model; tokenize and check the requests for it, each of them once.

        Args:
            module: The module that edits or evaluates.
            edit: Whether edit batches are needed.
            evaluate: Whether the requests are scored.

        Raises:
            RequestError: Naming every request that the model cannot take.
            ConfigError: If a metric can judge none of the requests.
        """
        if self._module is not module:
            self._module, self._batches, self._checked = module, [], False
            module.setup()
        if edit and not self._batches:
            self._batches = list(module.encode(self.requests).split(self.batch_size))
        if evaluate and not self._checked:
            module.check(self.requests)
            self._checked = True

    def train_dataloader(self) -> DataLoader[EditBatch]:
        """Edit batches, in order.

        Raises:
            ConfigError: If no module has been attached: the batches are its tokens.
        """
        if not self._batches:
            raise ConfigError("edit batches need a model: give the data to the Trainer, fit(module, datamodule=data)")
        return DataLoader(self._batches, batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[EditRequest] | list[Any]:
        """The same requests, to be scored; nothing where a run does without evaluation."""
        if not self.evaluate:
            return []
        return DataLoader(self.requests, batch_size=self.eval_batch_size, collate_fn=EditBatch)  # type: ignore[arg-type]
