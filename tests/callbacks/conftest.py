"""A short stream of edits for the callbacks to watch."""

import lightning as L
import torch

from cakeflow import EditDataModule, GradientSearch, LocateThenEdit
from cakeflow.data import builtin_facts
from cakeflow.data.contexts import Contexts
from cakeflow.models import Site

FACTS = builtin_facts()[:5]


def fit(lm, quiet, callbacks, batch_size=1, facts=FACTS, **trainer):
    """Five edits of one layer, some at a time."""
    module = LocateThenEdit(
        lm,
        [1],
        targets=GradientSearch(steps=4, lr=0.5),
        contexts=Contexts.of(["{}"]),
        moments={1: torch.eye(lm.key_width(Site(1, "mlp_out")), dtype=torch.float64) / 100},
    )
    trainer = L.Trainer(**{**quiet, **trainer}, callbacks=callbacks)
    trainer.fit(module, datamodule=EditDataModule(facts, batch_size))
    return module
