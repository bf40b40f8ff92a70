"""Sources of target representations: what should enter the classifier for an image that is corrected."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from cakeflow.errors import ConfigError, require_choice, require_positive
from cakeflow.models import VisionModel
from cakeflow_vision.direct import direct_scores, without_direct_effects
from cakeflow_vision.heads import (
    Head,
    Replacement,
    agreement,
    first_order_scores,
    replacements,
    representations,
    score_heads,
    top_heads,
    without_heads,
)
from cakeflow_vision.recall import Recall

Ranking = Literal["exact", "first_order", "direct", "random"]
Effect = Literal["total", "direct"]


@dataclass(frozen=True, eq=False)
class TargetProblem:
    """The images of a batch, and what they were measured against.

    Attributes:
        pixels: n images.
        labels: Their right labels.
        features: Path of a classifier -> what enters it, n x width.
        unrelated: Images to preserve.
        recall: Where values computed of the images are kept.
    """

    pixels: Float[Tensor, "n 3 height width"]
    labels: Int[Tensor, " n"]
    features: Mapping[str, Float[Tensor, "n width"]]
    unrelated: Float[Tensor, "m 3 height width"]
    recall: Recall = field(default_factory=Recall)


@dataclass(frozen=True, eq=False)
class RepresentationTargets:
    """Target representations.

    Attributes:
        values: Path of a classifier -> what should enter it, n x width.
        numbers: What is logged of them.
        heads: The heads that were replaced, if any.
    """

    values: Mapping[str, Float[Tensor, "n width"]]
    numbers: dict[str, float]
    heads: tuple[Head, ...] = ()


class RepresentationSource(ABC):
    """A source of target representations; subclasses are frozen dataclasses."""

    @abstractmethod
    def targets(self, vm: VisionModel, problem: TargetProblem) -> RepresentationTargets:
        """Return what should enter the classifiers for a batch of images."""


@dataclass(frozen=True)
class HeadTargets(RepresentationSource):
    """The representations without the heads that harm most, or without random ones as a control.

    Attributes:
        top: Number of heads.
        replacement: What takes their place: ``mean`` over the unrelated images, or ``zero``.
        ranking: How heads are chosen: ``exact`` (the loss without each), its ``first_order``, their ``direct`` effects,
            or ``random``.
        heads: Blocks and heads to take in place of a ranking, as ``[[5, 0], [7, 2]]``.
        seed: Seed of random heads.
        effect: Whether targets lack the heads' ``total`` effect, through the blocks above, or their ``direct`` one.

    Raises:
        ConfigError: If a setting is out of range.
    """

    top: int = 3
    replacement: Replacement = "mean"
    ranking: Ranking = "exact"
    heads: Sequence[Sequence[int]] = ()
    seed: int = 0
    effect: Effect = "total"

    def __post_init__(self) -> None:
        require_positive("HeadTargets", self, "top")
        require_choice("replacement", self.replacement, Replacement)
        require_choice("ranking", self.ranking, Ranking)
        require_choice("effect", self.effect, Effect)

    def targets(self, vm: VisionModel, problem: TargetProblem) -> RepresentationTargets:
        """Choose heads and run the images without them."""
        heads, numbers = self.choose(vm, problem)
        if self.effect == "direct":
            return RepresentationTargets(without_direct_effects(vm, heads, problem.pixels), numbers, tuple(heads))
        means = replacements(vm, self.replacement, problem.unrelated, problem.recall)
        values: dict[str, list[Tensor]] = {path: [] for path in vm.classifiers}
        for part in problem.pixels.split(1):
            with without_heads(vm, heads, means, len(part)):
                for path, each in representations(vm, part)[0].items():
                    values[path].append(each)
        return RepresentationTargets({path: torch.cat(each) for path, each in values.items()}, numbers, tuple(heads))

    def choose(self, vm: VisionModel, problem: TargetProblem) -> tuple[list[Head], dict[str, float]]:
        """Return the heads, and by their names in logs these, all scores and how far images agree with their signs.

        Args:
            vm: The model.
            problem: The images.

        Raises:
            ConfigError: If the model has fewer heads, or not those that are named.
        """
        heads, numbers = self._by_score(vm, problem) if not self.heads else (self._named(vm), {})
        for place, (layer, head) in enumerate(heads):
            numbers |= {f"heads/{place}/layer": float(layer), f"heads/{place}/head": float(head)}
        return heads, numbers

    def _by_score(self, vm: VisionModel, problem: TargetProblem) -> tuple[list[Head], dict[str, float]]:
        if self.top > vm.depth * vm.heads:
            raise ConfigError(f"targets.top is {self.top}, but {vm.name} has {vm.depth} x {vm.heads} heads")
        if self.ranking == "random":
            order = torch.randperm(vm.depth * vm.heads, generator=torch.Generator().manual_seed(self.seed)).tolist()
            return [divmod(place, vm.heads) for place in order[: self.top]], {}
        images = [problem.pixels, problem.labels, problem.unrelated]
        name = f"{self.ranking} scores of heads, {self.replacement}"
        scores = problem.recall(vm, name, images, partial(self._scores, vm, problem))
        heads, mean = top_heads(scores, self.top), scores.mean(0)
        places = [(layer, head) for layer in range(vm.depth) for head in range(vm.heads)]
        numbers = {f"heads/score/{layer}/{head}": float(mean[layer, head]) for layer, head in places}
        return heads, {"heads/agreement": agreement(scores, heads)} | numbers

    def _scores(self, vm: VisionModel, problem: TargetProblem) -> Float[Tensor, "n layers heads"]:
        if self.ranking == "direct":
            return direct_scores(vm, problem.pixels, problem.labels)
        means = replacements(vm, self.replacement, problem.unrelated, problem.recall)
        score = score_heads if self.ranking == "exact" else first_order_scores
        return score(vm, problem.pixels, problem.labels, means)

    def _named(self, vm: VisionModel) -> list[Head]:
        heads = [(int(layer), int(head)) for layer, head in self.heads]
        if bad := [each for each in heads if not (0 <= each[0] < vm.depth and 0 <= each[1] < vm.heads)]:
            raise ConfigError(f"targets.heads: {bad[0]} is no head of {vm.name}: {vm.depth} blocks of {vm.heads} heads")
        return heads


@dataclass(frozen=True)
class GradientTargets(RepresentationSource):
    """Representations that gradient steps bring to the right label, in the way of X-Edit's targets (Adam, a penalty).

    Attributes:
        steps: Number of steps.
        lr: Learning rate of Adam.
        decay: Weight of the squared norm of a change.
        clamp: Largest norm of a change, in norms of the representation.

    Raises:
        ConfigError: If a setting is out of range.
    """

    steps: int = 25
    lr: float = 0.05
    decay: float = 0.01
    clamp: float = 0.75

    def __post_init__(self) -> None:
        require_positive("GradientTargets", self, "steps", "lr", "clamp")

    def targets(self, vm: VisionModel, problem: TargetProblem) -> RepresentationTargets:
        """Descend the loss of the right labels by the representations, all classifiers together."""
        maps = {path: vm.module(path) for path in vm.classifiers}
        start = {path: each.float() for path, each in problem.features.items()}
        with torch.enable_grad():
            changes = {path: torch.zeros_like(each).requires_grad_() for path, each in start.items()}
            adam = torch.optim.Adam(changes.values(), lr=self.lr)
            for _ in range(self.steps):
                outputs = [maps[path](start[path].to(vm.dtype) + changes[path].to(vm.dtype)) for path in maps]
                loss = cross_entropy(torch.stack(outputs).mean(0).float(), problem.labels, reduction="sum")
                loss = loss + self.decay * sum((each**2).sum() for each in changes.values())
                gradients = torch.autograd.grad(loss, list(changes.values()))
                for change, gradient in zip(changes.values(), gradients, strict=True):
                    change.grad = gradient
                adam.step()
                self._clamp(changes, start)
        values = {path: start[path] + changes[path].detach() for path in maps}
        return RepresentationTargets(values, {"targets/loss": float(loss.detach()) / len(problem.labels)})

    @torch.no_grad()
    def _clamp(self, changes: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> None:
        for path, change in changes.items():
            limit = self.clamp * start[path].norm(dim=1, keepdim=True)
            change *= (limit / change.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1)
