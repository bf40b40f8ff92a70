"""The edit method: train the side memory on a batch's facts, and store their keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.core import EditModule
from cakeflow.data import Contexts, EditRequest
from cakeflow.errors import ConfigError
from cakeflow.evaluation import Evaluation
from cakeflow.forward import TextBatch, WeightLoss, encode_batch, pad
from cakeflow.journal import EditStep
from cakeflow.models import LanguageModel, Site, capture
from cakeflow_sidememory.changes import SideMemoryChange


@final
class SideMemory(EditModule[TextBatch]):
    """Edits facts in a copy of one down projection, which answers for inputs near their subjects' keys alone.

    A toy in the spirit of WISE (Wang et al. 2024): one memory that grows, sparse gradient descent, a router by
    distance. The weights of the model never change.

    Args:
        base: Name or folder of a model, or a ``LanguageModel``.
        layer: Block whose down projection gets the memory.
        steps: Largest number of gradient steps on a batch.
        lr: Length of a step, in norms of the memory's weight.
        max_loss: Mean negative log-likelihood of the targets at which a batch is done.
        density: Share of the memory's outputs that a batch may change, drawn at random.
        reach: Radius of a key, in distances to the nearest other token of its batch.
        seed: Seed of the drawn outputs.
        evaluation: Settings of the evaluation.

    Raises:
        ConfigError: If a setting is out of its range.
    """

    def __init__(
        self,
        base: str | LanguageModel,
        layer: int,
        steps: int = 40,
        lr: float = 0.05,
        max_loss: float = 0.05,
        density: float = 0.5,
        reach: float = 0.5,
        seed: int = 0,
        evaluation: Evaluation = Evaluation(),
    ) -> None:
        if not (layer >= 0 and steps > 0 and lr > 0 and 0 < density <= 1 and 0 < reach < 1):
            raise ConfigError(
                f"layer={layer}, steps={steps}, lr={lr}, density={density}, reach={reach}: layer must be at least 0, "
                "steps and lr above 0, density above 0 and at most 1, reach between 0 and 1"
            )
        super().__init__(base, evaluation, (), {})
        self.site = Site(layer, "mlp_out")
        self.steps, self.lr, self.max_loss = steps, lr, max_loss
        self.density, self.reach, self.seed = density, reach, seed

    def settings(self) -> dict[str, Any]:
        """Return all arguments that decide the outcome."""
        numbers = {name: getattr(self, name) for name in ("steps", "lr", "max_loss", "density", "reach", "seed")}
        return {"layer": self.site.layer, **numbers, "evaluation": repr(self.evaluation)}

    def encode(self, requests: Sequence[EditRequest]) -> TextBatch:
        """Tokenize the bare prompts with their targets."""
        return encode_batch(self.lm, requests, Contexts())

    def prepare(self, batches: Sequence[TextBatch]) -> None:
        """Check that the projection can be copied; nothing has to be measured."""
        self.lm.weight(self.site)

    def edit(self, batch: TextBatch, step: EditStep) -> None:
        """Train the memory on one batch and put it in place."""
        place, width = self.lm.architecture.path(self.site), self.lm.oriented(self.site).shape
        with self.phase("keys"):
            keys, radius = self.read_keys(batch)
        with self.phase("memory"):
            update, loss = self.fit_update(batch, SideMemoryChange(place, torch.zeros(width), keys, radius))
        numbers = {"loss": loss, "update": float(update.norm())}
        self.log_dict({f"memory/{name}": value for name, value in numbers.items()}, batch_size=len(batch))
        self.journal.apply(step, SideMemoryChange(place, update, keys, radius), numbers)

    @torch.no_grad()
    def read_keys(self, batch: TextBatch) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, " n"]]:
        """Read the key of each fact, the projection's input at its subject's last token, and choose its radius.

        No memory in this layer can move a key: the input of the projection comes from what lies below.
        """
        rows = [variants[0] for variants in batch.rows]
        ids = pad([row.ids for row in rows], self.lm.device)
        with capture(self.lm, [self.site], side="in", stop=True) as inputs:
            self.lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        hidden = inputs[self.site].float().cpu()
        keys = torch.stack([hidden[i, row.subject] for i, row in enumerate(rows)])
        others = [hidden[i, t] for i, row in enumerate(rows) for t in range(len(row.ids)) if t != row.subject]
        distance = torch.cdist(keys, torch.stack(others), compute_mode="donot_use_mm_for_euclid_dist")
        return keys, self.reach * distance.min(dim=1).values

    def fit_update(self, batch: TextBatch, start: SideMemoryChange) -> tuple[Float[Tensor, "d_out d_in"], float]:
        """Descend on the batch's loss under the router, in a trial that leaves the model as it was.

        ``start`` has the batch's keys and an update of zero. Returns the memory's update and the loss that it reaches.
        """
        best, lowest, update = start.update, math.inf, start.update
        mask, basis = self.mask(len(update), batch.first), self.preserved(start.place)
        with self.journal.trial() as trial:
            self.journal.apply(trial, start, {})
            objective = WeightLoss(self.lm, batch, self.site)
            length = self.lr * float(self.lm.weight(self.site).norm())
            for _ in range(self.steps + 1):  # the last pass only measures
                loss, gradient = objective(update)
                if loss < lowest:
                    best, lowest = update, loss
                if loss <= self.max_loss:
                    break
                direction = mask * (gradient - gradient @ basis @ basis.T)
                update = update - length * direction / direction.norm().clamp_min(1e-12)
        return best, lowest

    def mask(self, outputs: int, first: int) -> Float[Tensor, "d_out 1"]:
        """Draw the outputs that a batch may change; ``first`` is the place of its first fact in the run."""
        generator = torch.Generator().manual_seed(self.seed + first)
        return (torch.rand(outputs, 1, generator=generator) < self.density).float()

    def preserved(self, place: str) -> Float[Tensor, "d_in m"]:
        """Return an orthonormal basis of the keys of earlier batches: the memory must not change its answers there."""
        keys = self.journal.history(place).keys
        keys = torch.zeros(0, self.lm.key_width(self.site)) if keys is None else keys.cpu()
        basis: Tensor = torch.linalg.qr(keys.T)[0]
        return basis
