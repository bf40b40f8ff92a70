"""The loss of a model on a batch of facts, as a function of one weight."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call

from cakeflow.forward.packing import pad, plan
from cakeflow.forward.suffix import before_targets
from cakeflow.forward.tokens import Row, TextBatch
from cakeflow.models.architecture import Site
from cakeflow.models.hooks import capture, frozen, inject, logits_at, start_at
from cakeflow.models.language import LanguageModel


@dataclass(frozen=True, eq=False)
class WeightLoss:
    """Mean negative log-likelihood of the new targets on the bare prompts, as a function of a change of one weight.

    Attributes:
        lm: The model; not touched.
        batch: n facts.
        site: The projection whose weight changes.
        max_tokens: Most tokens in one forward and backward pass.
    """

    lm: LanguageModel
    batch: TextBatch
    site: Site
    max_tokens: int = 2048

    def __call__(self, change: Float[Tensor, "d_out d_in"]) -> tuple[float, Float[Tensor, "d_out d_in"]]:
        """Mean over the facts at ``weight + change``, and its gradient by the change."""
        leaf = change.detach().to(self.lm.weight(self.site)).requires_grad_()
        total, gradient = 0.0, torch.zeros_like(leaf)
        with torch.enable_grad():
            for _, rows, ids, hidden in self._groups:
                loss = self._of(rows, ids, hidden, leaf).sum() / len(self.batch)
                gradient += torch.autograd.grad(loss, leaf)[0]
                total += float(loss.detach())
        return total, gradient.to(change)

    def tokens(self) -> tuple[Float[Tensor, "m d_in"], Float[Tensor, "m d_out"]]:
        """Compute what the projection reads and should write at the m tokens that predict a token of a new target.

        Returns:
            Its inputs there, and the gradients by its outputs of the targets' negative log-likelihood, summed over all
            tokens, so that no row depends on how many there are; in float64, fact by fact.
        """
        parts = [(facts, *self._tokens_of(rows, ids, hidden)) for facts, rows, ids, hidden in self._groups]
        owners = torch.cat([torch.tensor(facts, device=row.device)[row] for facts, row, _, _ in parts])
        order = owners.argsort(stable=True)
        return torch.cat([keys for *_, keys, _ in parts])[order], torch.cat([part[-1] for part in parts])[order]

    def _tokens_of(self, rows: list[Row], ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the row, the input and the gradient of each token of some rows."""
        lm, site = self.lm, self.site
        row, column, label = torch.tensor(before_targets(rows, from_fact=False), device=ids.device).T
        delta = torch.zeros(len(row), len(lm.oriented(site)), dtype=hidden.dtype, device=ids.device).requires_grad_()
        with (
            torch.enable_grad(),
            frozen(lm),
            start_at(lm, site.layer, hidden),
            capture(lm, [site], side="in") as inputs,
            inject(lm, site, delta, column, row),
            logits_at(lm, row, column),
            lm.running(),
        ):
            logits = lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
            logits = logits if logits.dtype == torch.float64 else logits.float()
            loss = torch.nn.functional.cross_entropy(logits, label, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, delta)
        return row, inputs[site][row, column].detach().double(), gradient.double()

    @cached_property
    def _groups(self) -> list[tuple[list[int], list[Row], Tensor, Tensor]]:
        """Places of rows that run together, the rows, their ids, and the input of the site's block."""
        rows, groups = [variants[0] for variants in self.batch.rows], []
        below = Site(max(self.site.layer - 1, 0))
        for group in plan([len(row.ids) for row in rows], self.max_tokens):
            chosen = [rows[i] for i in group]
            ids = pad([row.ids[:-1] for row in chosen], self.lm.device)
            with torch.no_grad(), capture(self.lm, [below], stop=True) as states:
                self.lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            groups.append((group, chosen, ids, states[below]))
        return groups

    def _of(self, rows: list[Row], ids: Tensor, hidden: Tensor, change: Tensor) -> Float[Tensor, " rows"]:
        lm, layer = self.lm, self.site.layer
        row, column, label = torch.tensor(before_targets(rows, from_fact=False), device=ids.device).T
        # the change is d_out x d_in, the weight may be stored the other way round
        changed = {lm.weight_name(self.site): lm.weight(self.site).detach() + lm.oriented(self.site, change)}
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        with start_at(lm, layer, hidden), logits_at(lm, row, column), frozen(lm), lm.running():
            logits = functional_call(lm.model, changed, (), inputs, tie_weights=False).logits[0]
        each = torch.nn.functional.cross_entropy(logits.float(), label, reduction="none")
        return each.new_zeros(len(rows)).index_add(0, row, each) / torch.bincount(row)
