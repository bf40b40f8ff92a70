"""Heads removed for every image, by weights, and a classifier that is aligned with what remains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from cakeflow.errors import ArchitectureError, ConfigError
from cakeflow.journal import EditStep, WeightChange
from cakeflow.models import Site, VisionModel
from cakeflow.solvers import Covariance, LayerProblem, LeastSquares, Update
from cakeflow_vision.base import ImageBatch, ImageEdit
from cakeflow_vision.evaluation import tensors_of
from cakeflow_vision.heads import Head, columns_of, replacements, representations
from cakeflow_vision.targets import HeadTargets, TargetProblem


@final
class HeadRemoval(ImageEdit):
    """Removes the heads that harm most from the model, and aligns the representations that remain with the old ones.

    Reading B of RefineViT (Huang et al., NeurIPS 2025), of whose paper no equation could be read. Columns of an
    attention's output projection become zero; with heads at their mean, its bias takes what they gave on average over
    unrelated images and positions. With f before and f^ after, a projection P minimises ``sum_U |P f^ - f|^2 + agree
    sum_E |P f^ - f^|^2 + mu |P - I|^2`` and folds into the classifier, ``W P``.

    Args:
        base: Name or folder of an image classifier, or a ``VisionModel``.
        heads: How heads are chosen, and what takes their place.
        realign: Whether the classifier is aligned.
        agree: Weight of each edited image in that, where an unrelated one counts 1.
        ridge: mu, in parts of the mean second moment of all unrelated images.
        common: Further arguments, those of ``ImageEdit``: ``unrelated`` and what follows it.

    Raises:
        ConfigError: If no model is named, there are no unrelated images, or a weight is out of range.
        RequestError: If an unrelated image cannot be read.
    """

    deciding = ("heads", "realign", "agree", "ridge", *ImageEdit.deciding)

    def __init__(
        self,
        base: str | VisionModel = "",
        heads: HeadTargets = HeadTargets(),
        realign: bool = True,
        agree: float = 1.0,
        ridge: float = 0.01,
        **common: Any,
    ) -> None:
        if agree < 0 or not ridge > 0:
            raise ConfigError(f"agree={agree}, ridge={ridge}: agree must be 0 or more, ridge above 0")
        super().__init__(base, **common)
        self.heads, self.realign, self.agree, self.ridge = heads, realign, agree, ridge

    def prepare(self, batches: Sequence[ImageBatch]) -> None:
        """Read the unrelated images, and their representations by the unedited model."""
        super().prepare(batches)
        with self.phase("statistics"):
            self.pixels = tensors_of(self.lm, self.unrelated)
            self.features = representations(self.lm, self.pixels, self.recall)[0]

    def edit(self, batch: ImageBatch, step: EditStep) -> None:
        """Remove heads, then align every classifier."""
        pixels, labels = self.inputs_of(batch)
        with self.phase("targets"):
            features, _ = representations(self.lm, pixels, self.recall)
            problem = TargetProblem(pixels, labels, features, self.pixels, self.recall)
            heads, numbers = self.heads.choose(self.lm, problem)
        self.log_dict(numbers, batch_size=len(batch))
        means = replacements(self.lm, self.heads.replacement, self.pixels, self.recall)
        for layer in sorted({layer for layer, _ in heads}):
            mean = means[layer].double().mean((0, 1))
            self._remove(step, layer, [each for each in heads if each[0] == layer], mean)
        if self.realign:
            self._align(batch, step, pixels)

    def _remove(self, step: EditStep, layer: int, heads: Sequence[Head], mean: Tensor) -> None:
        """Set the columns of some heads of a block to zero; the bias takes what their mean would give."""
        name = self.lm.weight_name(Site(layer, "attn_out"))
        columns = columns_of(self.lm, [head for _, head in heads])
        weight = self.lm.oriented(name).detach().double()
        lost = torch.where(columns, weight, 0.0)
        if self.heads.replacement == "mean":
            bias = f"{name.removesuffix('weight')}bias"
            if getattr(self.lm.module(Site(layer, "attn_out")), "bias", None) is None:
                raise ArchitectureError(
                    f"{name} has no bias that could take the mean of a head; remove heads with replacement: zero"
                )
            self._take_away(step, bias, (lost @ mean)[None])
        self._take_away(step, name, -lost)

    def _take_away(self, step: EditStep, name: str, change: Tensor) -> None:
        """Make a change that removes something, and so is bounded by what is there."""
        update = Update(change.cpu())
        self.journal.apply(step, WeightChange(name, update), {"update": update.norm()})

    def _align(self, batch: ImageBatch, step: EditStep, pixels: Tensor) -> None:
        """Solve for each classifier's change: unrelated images get their old logits, the edited ones stay."""
        others = representations(self.lm, self.pixels, self.recall)[0]
        edited = representations(self.lm, pixels, self.recall)[0]
        for path in self.lm.classifiers:
            name = f"{path}.weight"
            weight, keys = self.lm.oriented(name).detach().double().cpu(), others[path].double().cpu()
            own, original = edited[path].double().cpu(), self.original_weight(name).double().cpu()
            problem = LayerProblem(
                keys,
                self.features[path].double().cpu() @ original.T - keys @ weight.T,
                weight=weight,
                original_weight=original,
                covariance=Covariance(own.T @ own / len(own), weight=self.agree * len(own)),
            )
            ridge = self.ridge * float((keys**2).sum()) / keys.shape[1]
            self.change(batch, step, name, LeastSquares(ridge).solve(problem), torch.empty(0, 0))
