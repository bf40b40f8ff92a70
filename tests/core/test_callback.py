"""A callback of a user's own that watches edits."""

import lightning as L
import pytest
import torch

from cakeflow import Contexts, EditDataModule, GradientSearch, LeastSquares, LocateThenEdit
from cakeflow.core.callback import EditCallback
from cakeflow.models import Site

LAYERS = [1, 2, 4]


class StopAtDrift(EditCallback):
    """Ends the run after the batch whose facts end further from their targets than ``limit``; see CONTRIBUTING.md."""

    def __init__(self, limit):
        self.limit = limit

    def on_batch_edited(self, module, left):
        if left.norm(dim=1).mean() > self.limit:
            module.trainer.should_stop = True


@pytest.mark.parametrize(("limit", "batches"), [(0.0, 1), (1e9, 3)])
def test_a_callback_can_stop_a_run(lm, requests, quiet, limit, batches):
    module = LocateThenEdit(
        lm,
        LAYERS,
        contexts=Contexts(),
        targets=GradientSearch(steps=2, lr=0.3),
        solver=LeastSquares(1.0),
        moments=dict.fromkeys(LAYERS, torch.eye(lm.key_width(Site(0, "mlp_out")), dtype=torch.float64)),
    )
    trainer = L.Trainer(**{**quiet, "callbacks": [StopAtDrift(limit)]})
    trainer.fit(module, datamodule=EditDataModule(requests[:6], 2))
    assert len(module.journal) == batches
