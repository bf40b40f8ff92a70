"""The base of methods that edit image classifiers: batches, unrelated images, questions to the model."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import Self

from cakeflow.core import EditModule
from cakeflow.data import EditRequest, ImageEditRequest, Picture, read_requests
from cakeflow.errors import ConfigError, Fault, NumericalError, RequestError, RequestWarning, listed
from cakeflow.forward import EditBatch
from cakeflow.journal import EditStep, WeightChange
from cakeflow.models import VisionModel, load_vision_model
from cakeflow.solvers import Update
from cakeflow_vision.evaluation import ImageEvaluation, check_labels, label_index, probabilities, questions, tensors_of
from cakeflow_vision.recall import Recall


class ImageBatch(EditBatch):
    """Image requests with the indices of their labels.

    Args:
        requests: n requests.
        labels: Index of the right label of each.
        numbers: Place of each request in its run.
    """

    requests: tuple[ImageEditRequest, ...]

    def __init__(
        self, requests: Sequence[ImageEditRequest], labels: Sequence[int], numbers: Sequence[int] = ()
    ) -> None:
        super().__init__(requests, numbers)
        self.labels = tuple(labels)

    def part(self, facts: Sequence[int]) -> Self:
        """The batch of the requests at some places."""
        parts = (self.requests, self.labels, self.numbers)
        return type(self)(*([each[i] for i in facts] for each in parts))  # type: ignore[arg-type]


def unrelated_pictures(source: Any) -> list[Picture]:
    """Return the pictures that an edit preserves.

    Args:
        source: A name as in ``read_requests``, or a list of requests, pictures, arrays, paths or PIL images.

    Raises:
        ConfigError: If there are none.
        RequestError: Naming each that cannot be read.
    """
    entries: Iterable[Any] = read_requests(source) if isinstance(source, (str, Path)) else source or ()
    pictures = [_picture(each) for each in entries]
    if not pictures:
        raise ConfigError(
            "no unrelated images: without them an edit would preserve nothing; give unrelated=..., a folder or a list "
            "of images like those that the model is used on, 400 for instance; their labels are not read"
        )
    if faults := [
        Fault(i, "unrelated", each.name or None, each.fault) for i, each in enumerate(pictures) if each.fault
    ]:
        raise RequestError(faults)
    return pictures


def _picture(value: Any) -> Picture:
    if isinstance(value, ImageEditRequest):
        return value.picture
    return value if isinstance(value, Picture) else Picture(value)


def image_requests(requests: Sequence[EditRequest]) -> list[ImageEditRequest]:
    """Return requests that are all of images.

    Raises:
        RequestError: Naming each that is not.
    """
    images = [each for each in requests if isinstance(each, ImageEditRequest)]
    if len(images) < len(requests):
        remedy = "is a fact in words; a classifier of images takes requests with image and label"
        others = [i for i, each in enumerate(requests) if not isinstance(each, ImageEditRequest)]
        raise RequestError([Fault(i, "prompt", requests[i].text, remedy) for i in others])
    return images


class ImageEdit(EditModule[ImageBatch]):
    """The base of methods that correct the labels of images; a subclass says how a batch is edited.

    Args:
        base: Name or folder of an image classifier, or a ``VisionModel``.
        unrelated: Images to preserve: a folder, a file, or a list (``unrelated_pictures``).
        max_relative_update: Largest update of a weight by one batch, in norms of the weight.
        evaluation: Settings of the evaluation.
        metrics: Further metrics of every evaluation.
        model_kwargs: Further arguments of ``load_vision_model``.
        record_texts: Whether the ledger has names and labels of the images; it never has pixels.
        record_images: Whether the run folder has the edited images made small, as PNG files.
        private: Whether only their owner can read the run folders that are made.
        recall: What was computed of images before, which edits of one model may share.

    Raises:
        ConfigError: If no model is named, there are no unrelated images, or ``max_relative_update`` is not above 0.
        RequestError: If an unrelated image cannot be read.
    """

    lm: VisionModel  # type: ignore[assignment]
    evaluation: ImageEvaluation  # type: ignore[assignment]
    deciding: tuple[str, ...] = ("max_relative_update", "evaluation")
    """Names of the attributes that decide the outcome, beside the unrelated images."""

    def __init__(
        self,
        base: str | VisionModel = "",
        unrelated: Any = None,
        max_relative_update: float = 10.0,
        evaluation: ImageEvaluation = ImageEvaluation(),
        metrics: Sequence[Metric] = (),
        model_kwargs: dict[str, Any] | None = None,
        record_texts: bool = True,
        record_images: bool = True,
        private: bool = True,
        recall: Recall | None = None,
    ) -> None:
        if not max_relative_update > 0:
            raise ConfigError(f"max_relative_update must be above 0, got {max_relative_update}")
        if not base:
            raise ConfigError("no model is named: give a folder or hub id of an image classifier, base=...")
        pictures = unrelated_pictures(unrelated)
        others: Any = evaluation
        wrapped: Any = base
        super().__init__(wrapped, others, metrics, dict(model_kwargs or {}), record_texts=record_texts, private=private)
        self.unrelated, self.max_relative_update, self.record_images = pictures, max_relative_update, record_images
        self.recall = Recall() if recall is None else recall
        self.first_probabilities: dict[str, Tensor] = {}

    def settings(self) -> dict[str, Any]:
        """Everything beside the model that decides the outcome; unrelated images by their hashes."""
        hashes = ",".join(picture.hash for picture in self.unrelated)
        return {name: repr(getattr(self, name)) for name in self.deciding} | {"unrelated": hashes}

    def load(self) -> VisionModel:
        """Load the model that was named."""
        return load_vision_model(str(self._base), **self._loading)

    # ---- questions to the model ----

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Check that these are images with labels that the model has, and that none is to be preserved as well."""
        images = image_requests(requests)
        check_labels(self.lm, images)
        preserved = {picture.hash for picture in self.unrelated}
        remedy = "is among the unrelated images, which keep the label that they get now; leave it out of unrelated"
        if both := [i for i, each in enumerate(images) if each.picture.hash in preserved]:
            raise RequestError([Fault(i, "image", images[i].subject, remedy) for i in both])

    def ask(self, requests: Sequence[EditRequest]) -> Any:
        """Classify the pictures of the next requests, by the unedited model too where it was not asked of one yet."""
        images = image_requests(requests)
        pictures = [row.picture for row in questions(images)]
        after = probabilities(self.lm, pictures, self.recall)
        if any(picture.hash not in self.first_probabilities for picture in pictures):
            before = after
            if len(self.journal):
                with self.journal.reverted():
                    before = probabilities(self.lm, pictures, self.recall)
            self.first_probabilities |= {picture.hash: each for picture, each in zip(pictures, before, strict=True)}
        return self.evaluation.ask(self.lm, images, after, self.first_probabilities)

    def warn_of_known(self, requests: Sequence[EditRequest]) -> None:
        """Warn of images that get their right label before any edit."""
        images = image_requests(requests)
        if not images:
            return
        labels = probabilities(self.lm, [each.picture for each in images], self.recall).argmax(1).tolist()
        if right := [i for i, each in enumerate(images) if label_index(self.lm, each.label) == labels[i]]:
            warnings.warn(
                f"images that get their right label before any edit: {listed(right)} (numbered from 0, in the order of "
                f"the edits), {len(right)} of {len(images)}; there is nothing to correct in them, leave them out",
                RequestWarning,
                stacklevel=3,
            )

    # ---- edits ----

    def prepare(self, batches: Sequence[ImageBatch]) -> None:
        """Write the images of a run, made small, into its folder, if there is one and they may be there."""
        if self.journal.store is None or not self.record_images:
            return
        for picture in {request.picture for batch in batches for request in batch.requests}:
            picture.save_thumbnail(self.journal.store.folder.parent)

    @abstractmethod
    def edit(self, batch: ImageBatch, step: EditStep) -> None:
        """Edit one batch."""

    def encode(self, requests: Sequence[EditRequest]) -> ImageBatch:
        """Find the class of every label."""
        self.check(requests)
        images = image_requests(requests)
        return ImageBatch(images, [label_index(self.lm, each.label) or 0 for each in images])

    def inputs_of(self, batch: ImageBatch) -> tuple[Tensor, Tensor]:
        """Return the images of a batch as the model takes them, and the indices of their labels."""
        labels = torch.tensor(batch.labels, device=self.lm.device)
        return tensors_of(self.lm, [each.picture for each in batch.requests]), labels

    def change(self, batch: ImageBatch, step: EditStep, name: str, update: Update, keys: Tensor) -> None:
        """Make one change, if its size is plausible.

        Args:
            batch: The images.
            step: The batch of the journal.
            name: Name of the weight or bias.
            update: The change of it.
            keys: n x d_in, the keys that it was solved for.

        Raises:
            NumericalError: If it is larger than ``max_relative_update``.
        """
        norm = float(self.lm.oriented(name).double().norm())
        if not update.norm() <= self.max_relative_update * norm:
            raise NumericalError(
                f"{name}, {batch.name(range(len(batch)))}: the update's norm is {update.norm():.3g}, the weight's "
                f"{norm:.3g}; preserve more (preserve=, or a higher ridge), edit fewer images, or raise "
                "max_relative_update"
            )
        self.log(f"{name.removesuffix('.weight').replace('.', '_')}/update", update.norm(), batch_size=len(batch))
        self.journal.apply(step, WeightChange(name, update, keys.double().cpu()), {"update": update.norm()})
