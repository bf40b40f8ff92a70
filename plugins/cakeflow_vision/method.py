"""The edit method: target representations, and a least-squares change of the classifier that gives their logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from cakeflow.errors import ConfigError
from cakeflow.journal import EditStep
from cakeflow.models import VisionModel
from cakeflow.solvers import Covariance, KeyHistory, LayerProblem, Solver, Update
from cakeflow_vision.base import ImageBatch, ImageEdit
from cakeflow_vision.evaluation import tensors_of
from cakeflow_vision.heads import representations
from cakeflow_vision.solvers import RelativeRidge
from cakeflow_vision.targets import HeadTargets, RepresentationSource, TargetProblem


@final
class ClassifierEdit(ImageEdit):
    """Corrects the labels of images by a change of the classifier, whose keys are representations of images.

    Our reading of RefineViT (Huang et al., NeurIPS 2025), of whose paper no equation could be read. With heads as
    targets: representations f of the edited images should give the logits that they give without the harmful heads,
    f^, and those of unrelated images should stay. A projection P of the representation with ``P f = f^`` folds into the
    classifier, ``W P``, so that this is a least-squares edit of W with keys f and residuals ``W (f^ - f)``.

    Args:
        base: Name or folder of an image classifier, or a ``VisionModel``.
        targets: Source of target representations.
        solver: The change of the classifier's weight; one that needs no targets descends the loss of the right labels.
        preserve: Weight of each unrelated image in the solve, where an edited one counts 1.
        divergence: Weight of the divergence from the unedited model on unrelated images, for a solver that descends a
            loss.
        history: Whether the images of earlier batches are preserved as well.
        common: Further arguments, those of ``ImageEdit``: ``unrelated`` and what follows it.

    Raises:
        ConfigError: If no model is named, there are no unrelated images, or a weight is below 0.
        RequestError: If an unrelated image cannot be read.
    """

    deciding = ("targets", "solver", "preserve", "divergence", "use_history", *ImageEdit.deciding)

    def __init__(
        self,
        base: str | VisionModel = "",
        targets: RepresentationSource = HeadTargets(),
        solver: Solver = RelativeRidge(),
        preserve: float = 0.1,
        divergence: float = 0.0,
        history: bool = True,
        **common: Any,
    ) -> None:
        if preserve < 0 or divergence < 0:
            raise ConfigError(f"preserve={preserve}, divergence={divergence}: weights must be 0 or more")
        super().__init__(base, **common)
        self.targets, self.solver = targets, solver
        self.preserve, self.divergence, self.use_history = preserve, divergence, history
        self.moments: dict[str, Covariance] = {}

    def prepare(self, batches: Sequence[ImageBatch]) -> None:
        """Read the unrelated images, and the second moment of their representations."""
        super().prepare(batches)
        with self.phase("statistics"):
            self.pixels = tensors_of(self.lm, self.unrelated)
            self.features = representations(self.lm, self.pixels, self.recall)[0]
            for path, each in self.features.items():
                rows = each.double().cpu()
                self.moments[path] = Covariance(rows.T @ rows / len(rows), weight=self.preserve * len(rows))

    def edit(self, batch: ImageBatch, step: EditStep) -> None:
        """Change every classifier so that the images get the logits of their targets."""
        pixels, labels = self.inputs_of(batch)
        with self.phase("keys"):
            features, _ = representations(self.lm, pixels, self.recall)
        values = features
        if self.solver.needs_targets:
            with self.phase("targets"):
                problem = TargetProblem(pixels, labels, features, self.pixels, self.recall)
                source = self.targets.targets(self.lm, problem)
                values = dict(source.values)
            self.log_dict(source.numbers, batch_size=len(batch))
        for path, update in self._updates(labels, features, values):
            self.change(batch, step, f"{path}.weight", update, features[path])

    def _updates(
        self,
        labels: Int[Tensor, " n"],
        features: dict[str, Float[Tensor, "n width"]],
        values: dict[str, Float[Tensor, "n width"]],
    ) -> Iterator[tuple[str, Update]]:
        """Yield the update of each classifier, solved in float64 on the CPU."""
        for path in self.lm.classifiers:
            name = f"{path}.weight"
            weight = self.lm.oriented(name).double().cpu()
            keys = features[path].double().cpu()
            problem = LayerProblem(
                keys,
                (values[path].double().cpu() - keys) @ weight.T,
                weight=weight,
                original_weight=self.original_weight(name).double().cpu(),
                covariance=self.moments[path],
                loss=self._loss(path, keys, labels, weight),
                history=self.journal.history(name) if self.use_history else KeyHistory(),
            )
            yield path, self.solver.solve(problem)

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
