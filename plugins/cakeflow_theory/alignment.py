"""Test of the assumption under CAKE's weights: layers with higher scores fit better alone."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.core import EditCallback, LayerEdit, LocateThenEdit
from cakeflow.forward import FactReader
from cakeflow.journal import WeightChange
from cakeflow.models import Site
from cakeflow.tracing import Attribution, CausalTrace, predicted_rows


class ScoreAlignment(EditCallback):
    """Rank correlation of scores with the fit of each layer alone (CAKE appendix A.5.2, table 5).

    Before a batch is edited, every layer up to the value site is edited alone and reverted, fact by fact. Logs
    ``layer{l}/left_alone``, the share of the residual that then remains (mean over facts); ``alignment``, the mean
    over facts of Kendall's tau-b of scores and minus that share; and ``alignment_of_depth``, the correlation for the
    layers' numbers as scores. A layer near the value site fits better whatever it knows, so scores that rise with
    depth align anyway: compare the two. Methods with a target at each layer (``residual_at="self"``) have no common
    residual and are skipped.

    Args:
        attribution: Measure of the scores, on each request's own prompt, for the token that the model predicts there.
    """

    def __init__(self, attribution: Attribution | None = None) -> None:
        self.attribution = attribution or CausalTrace()

    def on_layer_solved(self, module: LocateThenEdit, edit: LayerEdit) -> None:
        """Log the alignment before the first layer of a batch is written."""
        if edit.context.index > 0 or module.allocator.residual_at != "last":
            return
        layers = [layer for layer in module.layers if layer <= edit.context.value_site.layer]
        mismatch = single_layer_mismatch(module, edit, layers)
        rows = predicted_rows(module.lm, edit.batch, max_bytes=module.max_bytes)
        scores = self.attribution.within(module.max_bytes).attribute(module.lm, rows, layers)
        depth = torch.tensor(layers, dtype=torch.float64).expand_as(scores)
        numbers = {f"layer{layer}/left_alone": value for layer, value in zip(layers, mismatch.mean(0), strict=True)}
        numbers["alignment"] = alignment(scores, mismatch).nanmean()
        numbers["alignment_of_depth"] = alignment(depth, mismatch).nanmean()
        module.log_dict(numbers, batch_size=len(mismatch))


def alignment(scores: Float[Tensor, "n l"], mismatch: Float[Tensor, "n l"]) -> Float[Tensor, " n"]:
    """Compute Kendall's tau-b of scores and ``-mismatch`` over the layers of each fact; nan where one is constant.

    Example:
        >>> import torch
        >>> alignment(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.3, 0.1, 0.2]])).tolist()
        [0.3333...]
    """
    # not torchmetrics' kendall_rank_corrcoef, whose version 1.9 fails on a single fact
    ours, theirs = ((value[:, :, None] - value[:, None]).sign().double().cpu() for value in (scores, -mismatch))
    agreed, compared = (ours * theirs).sum((1, 2)), ours.square().sum((1, 2)) * theirs.square().sum((1, 2))
    return agreed / compared.sqrt()


def single_layer_mismatch(module: LocateThenEdit, edit: LayerEdit, layers: list[int]) -> Float[Tensor, "n l"]:
    """Compute the share of each fact's residual that remains after an edit of one layer alone.

    Args:
        module: The editing module; its weights are restored.
        edit: The edit of the batch's first layer.
        layers: The layers to try.
    """
    shares = []
    for index in range(len(edit.batch)):
        batch, value_site = edit.batch.part([index]), edit.context.value_site
        reader, row = FactReader(module.lm, batch), []
        for layer in layers:
            site = Site(layer, edit.context.site.role)
            keys, prompt_keys, values = reader.read(site, value_site)
            problem = module.problem(site, batch, keys, edit.residual[index, None], prompt_keys)
            change = WeightChange(module.lm.weight_name(site), module.solver.solve(problem).to("cpu"), keys.cpu())
            with module.journal.trial() as step:
                module.journal.apply(step, change, {})
                gain = reader.values(site, value_site) - values
            row.append((problem.residual - gain).norm() / problem.residual.norm())
        shares.append(torch.stack(row))
    return torch.stack(shares)
