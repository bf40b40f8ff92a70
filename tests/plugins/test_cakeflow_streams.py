"""The package of parts for streams: what configs can name, and streams in a model."""

from dataclasses import replace
from importlib.metadata import entry_points

import cakeflow_streams
import lightning as L
import pytest
import torch
from cakeflow_streams import RenewedNullSpace, SpectralGuard, UnusedSpace

from cakeflow import Contexts, EditDataModule, GradientSearch, LeastSquares, LocateThenEdit, NullSpace, Statistics
from cakeflow.core import EditCallback
from cakeflow.models import Site
from cakeflow.solvers import KeyHistory


def test_configs_can_name_every_part():
    ours = {each.name for each in entry_points(group="cakeflow.plugins") if each.module == "cakeflow_streams"}
    assert ours == set(cakeflow_streams.__all__)


class Fresh(EditCallback):
    """Solves every layer again with a history that has nothing cached."""

    def __init__(self):
        self.differences, self.earlier, self.changed = [], [], []

    def on_layer_solved(self, module, edit):
        history = KeyHistory()
        for rows in edit.problem.history.batches:
            history.append(edit.problem.history.keys[rows])
        again = module.solver.solve(replace(edit.problem, history=history)).dense
        self.differences.append(float((again - edit.update.dense).abs().max() / again.abs().max()))
        self.earlier.append(len(history))
        plain = LeastSquares(1e-3).solve(edit.problem).dense
        self.changed.append(float((plain - edit.update.dense).norm() / plain.norm()))


SOLVERS = [
    SpectralGuard(LeastSquares(1e-3)),
    SpectralGuard(NullSpace(LeastSquares(1e-3)), 0.5, 0.5, sides="input", unit_rows=True, weight="present"),
    NullSpace(UnusedSpace(LeastSquares(1e-3))),
    RenewedNullSpace(LeastSquares(1e-3), every=4),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=["both sides", "inputs", "unused", "renewed"])
def test_a_stream_in_a_model_is_solved_as_by_a_history_without_caches(tiny, requests, quiet, solver):
    before = {layer: tiny.oriented(Site(layer, "mlp_out")).clone() for layer in (1, 3)}
    width = tiny.key_width(Site(1, "mlp_out"))
    moment = torch.diag(torch.linspace(1e-4, 0.05, width, dtype=torch.float64))
    module = LocateThenEdit(
        tiny,
        [1, 3],
        contexts=Contexts.of(["{}", "I am. {}"]),
        targets=GradientSearch(steps=4, lr=0.3),
        solver=solver,
        statistics=Statistics(cov_weight=1.0),
        moments={1: moment, 3: moment},
        max_relative_update=float("inf"),
    )
    fresh = Fresh()
    L.Trainer(**quiet | {"callbacks": [fresh]}).fit(module, datamodule=EditDataModule(requests[:8], 2))
    assert fresh.earlier == [0, 0, 2, 2, 4, 4, 6, 6]
    assert max(fresh.differences) < 1e-9
    assert min(fresh.changed[2:]) > 0.01
    module.journal.rollback()
    assert all(torch.equal(tiny.oriented(Site(layer, "mlp_out")), weight) for layer, weight in before.items())
