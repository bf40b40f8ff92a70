"""The edit method: target representations, and a least-squares change of the classifier that gives their logits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from torchmetrics import Metric
from typing_extensions import Self

from cakeflow.core import EditModule
from cakeflow.data import EditRequest, ImageEditRequest, Picture, read_requests
from cakeflow.errors import ConfigError, Fault, NumericalError, RequestError, RequestWarning, listed
from cakeflow.forward import EditBatch
from cakeflow.journal import EditStep, WeightChange
from cakeflow.models import VisionModel, load_vision_model
from cakeflow.solvers import Covariance, KeyHistory, LayerProblem, Solver, Update
from cakeflow_vision.evaluation import ImageEvaluation, check_labels, label_index, probabilities, questions, tensors_of
from cakeflow_vision.heads import representations
from cakeflow_vision.solvers import RelativeRidge
from cakeflow_vision.targets import HeadTargets, RepresentationSource, TargetProblem


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


@final
class ClassifierEdit(EditModule[ImageBatch]):
    """Corrects the labels of images by a change of the classifier, whose keys are representations of images.

    Our reading of RefineViT (Huang et al., NeurIPS 2025), of whose paper no equation could be read. With heads as
    targets: representations f of the edited images should give the logits that they give without the harmful heads,
    f^, and those of unrelated images should stay. A projection P of the representation with ``P f = f^`` folds into the
    classifier, ``W P``, so that this is a least-squares edit of W with keys f and residuals ``W (f^ - f)``.

    Args:
        base: Name or folder of an image classifier, or a ``VisionModel``.
        targets: Source of target representations.
        solver: The change of the classifier's weight; one that needs no targets descends the loss of the right labels.
        unrelated: Images to preserve: a folder, a file, or a list (``unrelated_pictures``).
        preserve: Weight of each unrelated image in the solve, where an edited one counts 1.
        divergence: Weight of the divergence from the unedited model on unrelated images, for a solver that descends a
            loss.
        history: Whether the images of earlier batches are preserved as well.
        max_relative_update: Largest update of a classifier by one batch, in norms of its weight.
        evaluation: Settings of the evaluation.
        metrics: Further metrics of every evaluation.
        model_kwargs: Further arguments of ``load_vision_model``.
        record_texts: Whether the ledger has names and labels of the images; it never has pixels.
        private: Whether only their owner can read the run folders that are made.

    Raises:
        ConfigError: If no model is named, there are no unrelated images, or a weight is below 0.
        RequestError: If an unrelated image cannot be read.
    """

    lm: VisionModel  # type: ignore[assignment]
    evaluation: ImageEvaluation  # type: ignore[assignment]

    def __init__(
        self,
        base: str | VisionModel = "",
        targets: RepresentationSource = HeadTargets(),
        solver: Solver = RelativeRidge(),
        unrelated: Any = None,
        preserve: float = 0.1,
        divergence: float = 0.0,
        history: bool = True,
        max_relative_update: float = 10.0,
        evaluation: ImageEvaluation = ImageEvaluation(),
        metrics: Sequence[Metric] = (),
        model_kwargs: dict[str, Any] | None = None,
        record_texts: bool = True,
        private: bool = True,
    ) -> None:
        if preserve < 0 or divergence < 0:
            raise ConfigError(f"preserve={preserve}, divergence={divergence}: weights must be 0 or more")
        if not max_relative_update > 0:
            raise ConfigError(f"max_relative_update must be above 0, got {max_relative_update}")
        if not base:
            raise ConfigError("no model is named: give a folder or hub id of an image classifier, base=...")
        pictures = unrelated_pictures(unrelated)
        others: Any = evaluation
        wrapped: Any = base
        super().__init__(wrapped, others, metrics, dict(model_kwargs or {}), record_texts=record_texts, private=private)
        self.targets, self.solver, self.unrelated = targets, solver, pictures
        self.preserve, self.divergence, self.use_history = preserve, divergence, history
        self.max_relative_update = max_relative_update
        self.unedited: dict[str, Tensor] = {}
        self.moments: dict[str, Covariance] = {}

    def settings(self) -> dict[str, Any]:
        """Everything beside the model that decides the outcome; unrelated images by their hashes."""
        names = ("targets", "solver", "preserve", "divergence", "use_history", "max_relative_update", "evaluation")
        hashes = ",".join(picture.hash for picture in self.unrelated)
        return {name: repr(getattr(self, name)) for name in names} | {"unrelated": hashes}

    # ---- the model, and questions to it ----

    def load(self) -> VisionModel:
        """Load the model that was named."""
        return load_vision_model(str(self._base), **self._loading)

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Check that these are images with labels that the model has."""
        check_labels(self.lm, image_requests(requests))

    def ask(self, requests: Sequence[EditRequest]) -> Any:
        """Classify the pictures of the next requests, by the unedited model too where it was not asked of one yet."""
        images = image_requests(requests)
        pictures = [row.picture for row in questions(images)]
        after = probabilities(self.lm, pictures)
        if any(picture.hash not in self.unedited for picture in pictures):
            before = after
            if len(self.journal):
                with self.journal.reverted():
                    before = probabilities(self.lm, pictures)
            self.unedited |= {picture.hash: each for picture, each in zip(pictures, before, strict=True)}
        return self.evaluation.ask(self.lm, images, after, self.unedited)

    def warn_of_known(self, requests: Sequence[EditRequest]) -> None:
        """Warn of images that get their right label before any edit."""
        images = image_requests(requests)
        if not images:
            return
        labels = probabilities(self.lm, [each.picture for each in images]).argmax(1).tolist()
        if right := [i for i, each in enumerate(images) if label_index(self.lm, each.label) == labels[i]]:
            warnings.warn(
                f"images that get their right label before any edit: {listed(right)} (numbered from 0, in the order of "
                f"the edits), {len(right)} of {len(images)}; there is nothing to correct in them, leave them out",
                RequestWarning,
                stacklevel=3,
            )

    # ---- edits ----

    def encode(self, requests: Sequence[EditRequest]) -> ImageBatch:
        """Find the class of every label."""
        images = image_requests(requests)
        check_labels(self.lm, images)
        return ImageBatch(images, [label_index(self.lm, each.label) or 0 for each in images])

    def prepare(self, batches: Sequence[ImageBatch]) -> None:
        """Read the unrelated images, and the second moment of their representations."""
        with self.phase("statistics"):
            self.pixels = tensors_of(self.lm, self.unrelated)
            self.features, self.logits = representations(self.lm, self.pixels)
            for path, each in self.features.items():
                rows = each.double().cpu()
                self.moments[path] = Covariance(rows.T @ rows / len(rows), weight=self.preserve * len(rows))

    def edit(self, batch: ImageBatch, step: EditStep) -> None:
        """Change every classifier so that the images get the logits of their targets."""
        pixels = tensors_of(self.lm, [each.picture for each in batch.requests])
        labels = torch.tensor(batch.labels, device=self.lm.device)
        with self.phase("keys"):
            features, _ = representations(self.lm, pixels)
        values = features
        if self.solver.needs_targets:
            with self.phase("targets"):
                problem = TargetProblem(pixels, labels, features, self.pixels)
                source = self.targets.targets(self.lm, problem)
                values = dict(source.values)
            for place, (layer, head) in enumerate(source.heads):
                self.log_dict({f"heads/{place}/layer": float(layer), f"heads/{place}/head": float(head)})
            self.log_dict(source.numbers, batch_size=len(batch))
        for path, update in self._updates(batch, labels, features, values):
            name = f"{path}.weight"
            self.log(f"{path.replace('.', '_')}/update", update.norm(), batch_size=len(batch))
            self.journal.apply(
                step, WeightChange(name, update, features[path].double().cpu()), {"update": update.norm()}
            )

    def _updates(
        self,
        batch: ImageBatch,
        labels: Int[Tensor, " n"],
        features: dict[str, Float[Tensor, "n width"]],
        values: dict[str, Float[Tensor, "n width"]],
    ) -> Iterator[tuple[str, Update]]:
        """Yield the update of each classifier, solved in float64 on the CPU."""
        for path in self.lm.classifiers:
            name = f"{path}.weight"
            weight = self.lm.oriented(name).double().cpu()
            keys = features[path].double().cpu()
            wanting = (values[path].double().cpu() - keys) @ weight.T
            problem = LayerProblem(
                keys,
                wanting,
                weight=weight,
                original_weight=self.original_weight(name).double().cpu(),
                covariance=self.moments[path],
                loss=self._loss(path, keys, labels, weight),
                history=self.journal.history(name) if self.use_history else KeyHistory(),
            )
            update = self.solver.solve(problem)
            if not update.norm() <= self.max_relative_update * float(weight.norm()):
                raise NumericalError(
                    f"{name}, {batch.name(range(len(batch)))}: the update's norm is {update.norm():.3g}, the weight's "
                    f"{float(weight.norm()):.3g}; preserve more (preserve=, or a higher ridge), edit fewer images, or "
                    "raise max_relative_update"
                )
            yield path, update

    def _loss(
        self, path: str, keys: Tensor, labels: Tensor, weight: Tensor
    ) -> Callable[[Tensor], tuple[float, Tensor]]:
        """Return the loss at a change of one classifier, with its gradient: right labels, others as before."""
        bias = getattr(self.lm.module(path), "bias", None)
        offset = 0 if bias is None else bias.detach().double().cpu()
        others = self.features[path].double().cpu()
        with torch.no_grad():
            before = (others @ self.original_weight(f"{path}.weight").double().cpu().T + offset).log_softmax(1)
        return partial(_loss_at, keys, labels.cpu(), others, before, weight, offset, self.divergence)


@torch.enable_grad()
def _loss_at(
    keys: Tensor,
    labels: Tensor,
    others: Tensor,
    before: Tensor,
    weight: Tensor,
    offset: Any,
    divergence: float,
    change: Tensor,
) -> tuple[float, Tensor]:
    change = change.detach().clone().requires_grad_()
    changed = weight + change
    loss = cross_entropy(keys @ changed.T + offset, labels)
    if divergence:
        after = (others @ changed.T + offset).log_softmax(1)
        loss = loss + divergence * kl_div(after, before, reduction="batchmean", log_target=True)
    (gradient,) = torch.autograd.grad(loss, change)
    return float(loss.detach()), gradient
