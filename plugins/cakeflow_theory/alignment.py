"""Do layers with higher scores fit better alone? The assumption under CAKE's weights, measured."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.core.callback import EditCallback, LayerEdit
from cakeflow.forward.keys import FactReader
from cakeflow.journal.changes import WeightChange
from cakeflow.models.architecture import Site
from cakeflow.tracing import Attribution, CausalTrace
from cakeflow.tracing.facts import predicted_rows


class ScoreAlignment(EditCallback):
    """Rank correlation of scores with how well each layer fits alone (CAKE appendix A.5.2, table 5).

    Before a batch is edited, every layer up to the value site is edited alone and taken back, fact by fact. Logs
    ``layer{l}/left_alone``, the share of the residual that then remains (mean over facts); ``alignment``, the mean
    over facts of Kendall's tau-b of scores and minus that share; and ``alignment_of_depth``, the same with the layers'
    numbers as scores. A layer near the value site fits better whatever it knows, so scores that rise with depth align
    anyway: compare the two. Methods with a target at each layer (``residual_at="self"``) have no common residual and are
    left out.

    Args:
        attribution: Scores each request's own prompt, for the token that the model predicts there.
    """

    def __init__(self, attribution: Attribution | None = None) -> None:
        self.attribution = attribution or CausalTrace()

    def on_layer_solved(self, module: L.LightningModule, edit: LayerEdit) -> None:
        """See ``EditCallback``."""
        walk: Any = module
        if edit.context.index > 0 or walk.allocator.residual_at != "last":
            return
        layers = [layer for layer in walk.layers if layer <= edit.context.value_site.layer]
        mismatch = single_layer_mismatch(walk, edit, layers)
        scores = self.attribution.attribute(walk.lm, predicted_rows(walk.lm, edit.batch), layers)
        depth = torch.tensor(layers, dtype=torch.float64).expand_as(scores)
        numbers = {f"layer{layer}/left_alone": value for layer, value in zip(layers, mismatch.mean(0), strict=True)}
        numbers["alignment"] = alignment(scores, mismatch).nanmean()
        numbers["alignment_of_depth"] = alignment(depth, mismatch).nanmean()
        module.log_dict(numbers, batch_size=len(mismatch))


def alignment(scores: Float[Tensor, "n l"], mismatch: Float[Tensor, "n l"]) -> Float[Tensor, " n"]:
    """Kendall's tau-b of scores and ``-mismatch`` over the layers, for each fact; nan where one of them is constant.

    Example:
        >>> import torch
        >>> alignment(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.3, 0.1, 0.2]])).tolist()
        [0.3333...]
    """
    # not torchmetrics' kendall_rank_corrcoef, whose version 1.9 fails on a single fact
    ours, theirs = ((value[:, :, None] - value[:, None]).sign().double().cpu() for value in (scores, -mismatch))
    agreed, compared = (ours * theirs).sum((1, 2)), ours.square().sum((1, 2)) * theirs.square().sum((1, 2))
    return agreed / compared.sqrt()


def single_layer_mismatch(walk: Any, edit: LayerEdit, layers: list[int]) -> Float[Tensor, "n l"]:
    """Share of what is missing at the value site that is still missing after one layer alone was edited for one fact.

    Args:
        walk: The ``LocateThenEdit``; its weights are as they were when this returns.
        edit: The first layer of the batch in hand.
        layers: Which layers to try.
    """
    shares = []
    for index in range(len(edit.batch)):
        batch, value_site = edit.batch.part(slice(index, index + 1)), edit.context.value_site
        reader, row = FactReader(walk.lm, batch), []
        for layer in layers:
            site = Site(layer, edit.context.site.role)
            keys, prompt_keys, before = reader.read(site, value_site)
            problem = walk.problem(site, batch, keys, edit.residual[index, None], prompt_keys)
            change = WeightChange(walk.lm.weight_name(site), walk.solver.solve(problem).to("cpu"), keys.cpu())
            with walk.journal.trial() as step:
                walk.journal.apply(step, change, {})
                gained = reader.values(site, value_site) - before
            row.append((problem.residual - gained).norm() / problem.residual.norm())
        shares.append(torch.stack(row))
    return torch.stack(shares)
