"""Evaluation of a classifier: the label of every picture of a request, before and after an edit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from cakeflow.data import ImageEditRequest, Picture
from cakeflow.errors import ConfigError, Fault, RequestError, listed
from cakeflow.journal import EvaluatedRequest, PromptAnswer
from cakeflow.models import VisionModel
from cakeflow_vision.heads import representations
from cakeflow_vision.metrics import (
    KINDS,
    EditSuccess,
    GroupGeneralization,
    LabelLocality,
    MirrorAccuracy,
    WorstGroup,
)
from cakeflow_vision.recall import Recall


class Question(NamedTuple):
    """One picture to classify: the place of its request, its kind, and its right label, if it has one."""

    record: int
    kind: int
    picture: Picture
    label: int | str | None
    group: str | None


def questions(requests: Sequence[ImageEditRequest]) -> list[Question]:
    """Return the pictures of some requests, the probes of each behind it."""
    rows = []
    for place, request in enumerate(requests):
        rows.append(Question(place, 0, request.picture, request.label, request.group))
        for each in request.image_probes:
            rows.append(Question(place, KINDS.index(each.kind), each.picture, each.label, each.group))
    return rows


def label_index(vm: VisionModel, label: int | str | None) -> int | None:
    """Return the index of a label, None if the model has no such class."""
    if isinstance(label, int):
        return label if 0 <= label < len(vm.labels) else None
    return vm.labels.index(label) if label in vm.labels else None


def check_labels(vm: VisionModel, requests: Sequence[ImageEditRequest]) -> None:
    """Check that the model has the classes that requests name.

    Raises:
        RequestError: Naming every label that it has not.
    """
    names = f"a class of the model: 0 to {len(vm.labels) - 1}, or {listed(vm.labels, 5)}"
    labels = [("label" if row.kind == 0 else "probes.label", row) for row in questions(requests)]
    faults = [
        Fault(row.record, field, row.label, f"must be {names}")
        for field, row in labels
        if row.label is not None and label_index(vm, row.label) is None
    ]
    if faults:
        raise RequestError(faults)


def tensors_of(vm: VisionModel, pictures: Sequence[Picture]) -> Tensor:
    """Return the pictures as the model takes them."""
    return torch.cat([vm.pixels([picture.pixels()]) for picture in pictures])


def probabilities(vm: VisionModel, pictures: Sequence[Picture], recall: Recall | None = None) -> Tensor:
    """Return the probability of each class for each picture, n x labels, in float64.

    Args:
        vm: The model.
        pictures: n pictures.
        recall: Where their representations are kept.
    """
    logits = representations(vm, tensors_of(vm, pictures), recall)[1]
    return logits.double().softmax(1)


@dataclass(frozen=True, eq=False)
class ImageAnswers:
    """A model's answers to the pictures of some requests.

    Attributes:
        requests: The requests.
        labels: Names of the classes.
        rows_asked: The pictures.
        expected: Index of the right label of each, -1 without one.
        after: Probabilities now.
        before: Probabilities of the unedited model.
    """

    requests: Sequence[ImageEditRequest]
    labels: Sequence[str]
    rows_asked: Sequence[Question]
    expected: Tensor
    after: Tensor
    before: Tensor

    def fields(self) -> dict[str, Any]:
        """Return all that a metric can use, by the names of the arguments of its ``update``."""
        top = self.before.topk(2, 1).values
        return {
            "kind": torch.tensor([row.kind for row in self.rows_asked]),
            "right": (self.after.argmax(1) == self.expected).cpu(),
            "labelled": (self.expected >= 0).cpu(),
            "agrees": (self.after.argmax(1) == self.before.argmax(1)).cpu(),
            "right_before": (self.before.argmax(1) == self.expected).cpu(),
            "margin": (top[:, 0] - top[:, 1]).cpu(),
            "group": torch.tensor([_group_number(row.group) for row in self.rows_asked]),
        }

    def rows(self, first: int = 0) -> Iterator[EvaluatedRequest]:
        """Yield the answers request by request; ``first`` is the number of the first one."""
        answers: list[list[PromptAnswer]] = [[] for _ in self.requests]
        logs = self.after.clamp_min(1e-300).log()
        for place, row in enumerate(self.rows_asked):
            own, rival = int(self.expected[place]), int(self.before[place].argmax())
            expected = rival if own < 0 else own
            other = None if rival == expected else rival
            answer = PromptAnswer(
                kind=KINDS[row.kind],
                prompt=row.picture.name or f"image {row.picture.hash[:12]}",
                expected=self.labels[expected],
                rival=None if other is None else self.labels[other],
                expected_logprob=float(logs[place, expected]),
                rival_logprob=None if other is None else float(logs[place, other]),
                correct=int(self.after[place].argmax()) == expected,
            )
            answers[row.record].append(answer)
        names = ("case_id", "prompt", "subject", "target_new", "target_true", "relation")
        for index, request in enumerate(self.requests):
            values = {name: getattr(request, name) for name in names}
            yield EvaluatedRequest(index=first + index, **values, prompts=answers[index])


def _group_number(group: str | None) -> int:
    """Return a number that stands for the name of a group, the same in every process; -1 for none."""
    return -1 if group is None else int(hashlib.sha256(group.encode()).hexdigest()[:15], 16)


@dataclass(frozen=True)
class ImageEvaluation:
    """Settings of an evaluation of images.

    Attributes:
        sensitive: Margin of the top two probabilities below which a picture counts as sensitive.
    """

    sensitive: float = 0.05

    @property
    def id(self) -> str:
        """Name of everything that decides the numbers."""
        return f"images-v1+sensitive{self.sensitive:g}"

    def metrics(self, further: Sequence[Metric] = ()) -> MetricCollection:
        """Return every metric by its name in tables and logs.

        Args:
            further: Further metrics, named by their class.

        Raises:
            ConfigError: If two have one name.
        """
        metrics: dict[str, Metric | MetricCollection] = {
            "sr": EditSuccess(),
            "gr": GroupGeneralization(),
            "gr_official": GroupGeneralization("official"),
            "lr": LabelLocality(),
            "lr_sensitive": LabelLocality(self.sensitive),
            "mirror": MirrorAccuracy(),
            "worst_group": WorstGroup(),
        }
        for metric in further:
            name = type(metric).__name__.lower()
            if name in metrics:
                raise ConfigError(f"there is a metric {name!r} already; give {type(metric).__name__} another name")
            metrics[name] = metric
        return MetricCollection(metrics, compute_groups=False)

    def ask(
        self, vm: VisionModel, requests: Sequence[ImageEditRequest], after: Tensor, before: Mapping[str, Tensor]
    ) -> ImageAnswers:
        """Return the answers to all pictures of some requests.

        Args:
            vm: The model.
            requests: The requests.
            after: Probabilities of their pictures now.
            before: Hash of a picture -> probabilities of the unedited model.
        """
        rows = questions(requests)
        indices = [label_index(vm, row.label) for row in rows]
        expected = torch.tensor([-1 if index is None else index for index in indices], device=after.device)
        unedited = torch.stack([before[row.picture.hash] for row in rows])
        return ImageAnswers(requests, vm.labels, rows, expected, after, unedited)
