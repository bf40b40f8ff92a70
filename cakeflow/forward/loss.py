"""The model's own loss on a batch of facts, as a function of one layer's weight."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call

from cakeflow.forward.packing import pad, plan
from cakeflow.forward.suffix import before_targets
from cakeflow.forward.tokens import EditBatch, Row
from cakeflow.models.architecture import Site, is_transposed
from cakeflow.models.hooks import capture, frozen, logits_at, start_at
from cakeflow.models.language import LanguageModel


@dataclass(frozen=True, eq=False)
class WeightLoss:
    """Mean negative log-likelihood of the new targets on the bare prompts, with a layer's weight changed.

    Attributes:
        lm: The model; not touched.
        batch: n facts.
        layer: Whose projection changes.
        max_tokens: Most tokens in one forward and backward pass.
    """

    lm: LanguageModel
    batch: EditBatch
    layer: int
    max_tokens: int = 2048

    def __call__(self, change: Float[Tensor, "d_out d_in"]) -> tuple[float, Float[Tensor, "d_out d_in"]]:
        """Mean over the facts at ``weight + change``, and its gradient by the change."""
        leaf = change.detach().to(self.lm.weight(self.layer)).requires_grad_()
        total, gradient = 0.0, torch.zeros_like(leaf)
        with torch.enable_grad():
            for rows, ids, hidden in self._groups:
                loss = self._of(rows, ids, hidden, leaf).sum() / len(self.batch)
                gradient += torch.autograd.grad(loss, leaf)[0]
                total += float(loss.detach())
        return total, gradient.to(change)

    @cached_property
    def _groups(self) -> list[tuple[list[Row], Tensor, Tensor]]:
        """Rows that run together, their ids, and what enters the layer's block."""
        rows, found = [variants[0] for variants in self.batch.rows], []
        for group in plan([len(row.ids) for row in rows], self.max_tokens):
            chosen = [rows[i] for i in group]
            ids = pad([row.ids[:-1] for row in chosen], self.lm.device)
            below = Site(max(self.layer - 1, 0))
            with torch.no_grad(), capture(self.lm, [below], stop=True) as seen:
                self.lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            found.append((chosen, ids, seen[below]))
        return found

    def _of(self, rows: list[Row], ids: Tensor, hidden: Tensor, change: Tensor) -> Float[Tensor, " rows"]:
        row, column, label = torch.tensor(before_targets(rows, from_subject=False), device=ids.device).T
        site = Site(self.layer, "mlp_out")
        name = f"{self.lm.architecture.path(site)}.weight"
        weight = self.lm.weight(self.layer).detach()
        moved = {name: weight + (change.T if is_transposed(self.lm.module(site)) else change)}
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        with (
            start_at(self.lm, self.layer, hidden),
            logits_at(self.lm, row, column),
            frozen(self.lm),
            self.lm.evaluating(),
        ):
            logits = functional_call(self.lm.model, moved, (), inputs, tie_weights=False).logits[0]
        each = torch.nn.functional.cross_entropy(logits.float(), label, reduction="none")
        return each.new_zeros(len(rows)).index_add(0, row, each) / torch.bincount(row)
