"""Edits of the MLPs of blocks at the class token, in the way of ROME, MEMIT, AlphaEdit and X-Edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from cakeflow.errors import ConfigError, require_choice, require_positive
from cakeflow.journal import EditStep
from cakeflow.models import Site, VisionModel, capture, frozen, inject
from cakeflow.solvers import Covariance, KeyHistory, LayerProblem, LeastSquares, NullSpace, Solver
from cakeflow_vision.base import ImageBatch, ImageEdit
from cakeflow_vision.evaluation import tensors_of
from cakeflow_vision.heads import IMAGES

Tokens = Literal["first", "all"]
"""Tokens whose keys unrelated images are preserved by: the class token, or every token."""


@dataclass(frozen=True)
class ValueSearch:
    """The output of an MLP at the class token that brings the right label: steps of Adam, a penalty and a clamp.

    The defaults are those of X-Edit's code (Lau et al., 2026).

    Attributes:
        steps: Number of steps.
        lr: Learning rate.
        decay: Weight of the squared norm of a change.
        clamp: Largest norm of a change, in norms of the output.

    Raises:
        ConfigError: If a setting is out of range.
    """

    steps: int = 25
    lr: float = 0.1
    decay: float = 0.01
    clamp: float = 0.75

    def __post_init__(self) -> None:
        require_positive("ValueSearch", self, "steps", "lr", "clamp")

    def search(
        self, vm: VisionModel, site: Site, pixels: Float[Tensor, "n 3 height width"], labels: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n width"], float]:
        """Return the change of each image's output at the site, and the mean loss that remains.

        Args:
            vm: The model.
            site: The projection.
            pixels: n images.
            labels: Their right labels.

        Raises:
            ConfigError: If the class token does not reach the classifier from there.
        """
        with torch.no_grad(), capture(vm, [site]) as outputs:
            vm.logits(pixels)
        limit = self.clamp * outputs[site][:, 0].float().norm(dim=1, keepdim=True)
        first = torch.zeros(len(pixels), dtype=torch.long, device=vm.device)
        delta = torch.zeros(len(pixels), vm.width, device=vm.device, requires_grad=True)
        adam = torch.optim.Adam([delta], lr=self.lr)
        with torch.enable_grad(), frozen(vm):
            for _ in range(self.steps):
                with inject(vm, site, delta, first):
                    losses = cross_entropy(vm.logits(pixels).float(), labels, reduction="none")
                (gradient,) = torch.autograd.grad(losses.sum(), delta, allow_unused=True)
                if gradient is None or not gradient.any():
                    raise ConfigError(
                        f"layers: what block {site.layer} writes at the first token does not reach the classifier of "
                        f"{vm.name}, which reads other tokens; edit lower blocks only"
                    )
                delta.grad = gradient + 2 * self.decay * delta.detach()
                adam.step()
                with torch.no_grad():
                    delta *= (limit / delta.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1)
        return delta.detach(), float(losses.detach().mean())


@final
class ProjectionEdit(ImageEdit):
    """Corrects the labels of images by the MLPs of some blocks: least squares with the class token's keys.

    From the lowest block up, a change of the MLP's output at the class token is searched for each image
    (``ValueSearch``), and this block takes ``1 / (blocks left)`` of it. An edit of an MLP changes every token: keys of
    the class token alone (``tokens: first``, as X-Edit has it) do not protect the patches.

    Args:
        base: Name or folder of an image classifier, or a ``VisionModel``.
        layers: Blocks from the lowest up; negative ones count from the last.
        solver: The change of a projection's weight.
        search: The search for the outputs.
        tokens: Tokens of unrelated images whose keys are preserved: the ``first`` (the class token) or ``all``.
        preserve: Weight of each unrelated image in the solve, where an edited one counts 1.
        history: Whether the images of earlier batches are preserved as well.
        common: Further arguments, those of ``ImageEdit``: ``unrelated`` and what follows it.

    Raises:
        ConfigError: If no model is named, there are no unrelated images, or a setting is out of range.
        RequestError: If an unrelated image cannot be read.
    """

    deciding = ("layers", "solver", "search", "tokens", "preserve", "use_history", *ImageEdit.deciding)

    def __init__(
        self,
        base: str | VisionModel = "",
        layers: Sequence[int] = (-3, -2, -1),
        solver: Solver = NullSpace(LeastSquares(1e-4)),
        search: ValueSearch = ValueSearch(),
        tokens: Tokens = "all",
        preserve: float = 0.1,
        history: bool = True,
        **common: Any,
    ) -> None:
        require_choice("tokens", tokens, Tokens)
        if preserve < 0:
            raise ConfigError(f"preserve={preserve}: a weight must be 0 or more")
        if not layers:
            raise ConfigError("layers names no block to edit; give some, such as layers: [-3, -2, -1]")
        super().__init__(base, **common)
        self.layers, self.solver, self.search = tuple(layers), solver, search
        self.tokens, self.preserve, self.use_history = tokens, preserve, history
        self.moments: dict[int, Covariance] = {}

    def check_model(self) -> None:
        """Check that the model has the blocks."""
        self._sites()

    def _sites(self) -> list[Site]:
        depth = self.lm.depth
        if bad := [layer for layer in self.layers if not -depth <= layer < depth]:
            raise ConfigError(f"layers: {bad[0]} is no block of {self.lm.name}, which has {depth}: 0 to {depth - 1}")
        return [Site(layer, "mlp_out") for layer in sorted({layer % depth for layer in self.layers})]

    def prepare(self, batches: Sequence[ImageBatch]) -> None:
        """Read the second moments of keys over unrelated images."""
        super().prepare(batches)
        with self.phase("statistics"):
            pixels = tensors_of(self.lm, self.unrelated)
            name = f"second moments at {self.layers}, {self.tokens}"
            moments = self.recall(self.lm, name, [pixels], lambda: self._second_moments(pixels), classifiers=False)
            weight = self.preserve * len(self.unrelated)
            self.moments = {layer: Covariance(moment, weight=weight) for layer, moment in moments.items()}

    @torch.no_grad()
    def _second_moments(self, pixels: Tensor) -> dict[int, Tensor]:
        sums: dict[int, Tensor] = {}
        for part in pixels.split(IMAGES):
            with capture(self.lm, self._sites(), side="in") as inputs:
                self.lm.logits(part)
            for site, each in inputs.items():
                rows = (each[:, :1] if self.tokens == "first" else each).flatten(0, 1).double().cpu()
                total = sums.get(site.layer, torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64))
                sums[site.layer] = total + rows.T @ rows * (len(part) / len(rows))
        return {layer: total / len(pixels) for layer, total in sums.items()}

    def edit(self, batch: ImageBatch, step: EditStep) -> None:
        """Change the blocks from the lowest up."""
        pixels, labels = self.inputs_of(batch)
        sites = self._sites()
        for place, site in enumerate(sites):
            with self.phase("targets"):
                delta, loss = self.search.search(self.lm, site, pixels, labels)
            self.log(f"layers/{site.layer}/loss", loss, batch_size=len(batch))
            with self.phase("keys"), torch.no_grad(), capture(self.lm, [site], side="in") as inputs:
                self.lm.logits(pixels)
            keys, name = inputs[site][:, 0].double().cpu(), self.lm.weight_name(site)
            problem = LayerProblem(
                keys,
                delta.double().cpu() / (len(sites) - place),
                weight=self.lm.oriented(name).detach().double().cpu(),
                original_weight=self.original_weight(name).double().cpu(),
                covariance=self.moments[site.layer],
                history=self.journal.history(name) if self.use_history else KeyHistory(),
            )
            self.change(batch, step, name, self.solver.solve(problem), keys)
