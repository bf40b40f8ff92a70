"""The package of parts for streams: what configs can name, and streams in a model."""

import copy
from dataclasses import replace
from importlib.metadata import entry_points

import cakeflow_streams
import lightning as L
import pytest
import torch
from cakeflow_streams import NormalizedGradient, PreservationQueue, RenewedNullSpace, SpectralGuard, UnusedSpace
from tiny_runs import editor_of, state

from cakeflow import Contexts, EditDataModule, GradientSearch, LeastSquares, LocateThenEdit, NullSpace, Statistics
from cakeflow.core import EditCallback
from cakeflow.errors import ConfigError
from cakeflow.models import Site
from cakeflow.solvers import KeyHistory


def test_configs_can_name_every_part():
    ours = {each.name for each in entry_points(group="cakeflow.plugins") if each.module == "cakeflow_streams"}
    assert ours == {name for name in cakeflow_streams.__all__ if isinstance(getattr(cakeflow_streams, name), type)}


class Fresh(EditCallback):
    """Solves every layer again with a history that has nothing cached."""

    def __init__(self):
        self.differences, self.earlier, self.changed = [], [], []

    def on_layer_solved(self, module, edit):
        history, earlier = KeyHistory(), edit.problem.history
        for rows in earlier.batches:
            history.append(earlier.keys[rows], earlier.facts[rows], earlier.values[rows])
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
    PreservationQueue(LeastSquares(1e-3), limit=0.1),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=["both sides", "inputs", "unused", "renewed", "queue"])
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


class StopAfter(L.Callback):
    """Stops a run as Ctrl+C does."""

    def __init__(self, batches):
        self.batches = batches

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if index + 1 == self.batches:
            raise KeyboardInterrupt


def fit(lm, requests, folder, *callbacks, **parts):
    editor = editor_of(lm, {"callbacks": [*callbacks]}, contexts=Contexts.of(["{}", "I am. {}"]), **parts)
    editor.fit(requests, 2, evaluate=False, run_dir=folder)
    return editor


STREAMS = {
    "queue": {"solver": PreservationQueue(LeastSquares(1e-3), limit=0.1)},
    "gradient": {"solver": NormalizedGradient(lr=1e-3, ridge=0.1)},
}


@pytest.mark.parametrize("stream", STREAMS)
def test_a_stream_resumes_and_rolls_back_bit_for_bit(lm, requests, tmp_path, stream):
    """What a solver knows of earlier batches is the same after a stop, and gone with a batch that is taken back."""
    parts, before, first = STREAMS[stream], copy.deepcopy(lm), copy.deepcopy(lm)
    whole = fit(lm, requests[:8], tmp_path / "whole", **parts)
    expected = state(lm, whole.module)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(first, requests[:8], tmp_path / "run", StopAfter(3), **parts)
    resumed = fit(again := copy.deepcopy(before), requests[:8], tmp_path / "run", **parts)
    assert state(again, resumed.module) == expected
    short = fit(other := copy.deepcopy(before), requests[:6], tmp_path / "short", **parts)
    three = state(other, short.module)
    whole.rollback(1)
    assert state(lm, whole.module) == three
    whole.fit(requests[6:8], 2, evaluate=False, run_dir=tmp_path / "later")
    assert state(lm, whole.module) == expected
    whole.rollback(batch=1)
    short.rollback(batch=1)
    short.fit(requests[6:8], 2, evaluate=False, run_dir=tmp_path / "without")
    numbers = [[part.numbers["update"] for part in editor.journal[-1].changes] for editor in (whole, short)]
    assert numbers[0] != numbers[1]  # the last batch counts on the one that was taken back
    whole.rollback()
    assert state(lm, whole.module) == state(before, editor_of(before, **parts).module)


def test_a_queue_counts_without_a_fact_that_was_undone(lm, requests, tmp_path):
    """In the process that undid it, where much is cached, as in one that read its journal."""
    parts, fresh = STREAMS["queue"], copy.deepcopy(lm)
    editor = fit(lm, requests[:6], tmp_path / "run", **parts)
    editor.undo(requests[1].text)
    assert editor.journal[-1].undone
    loaded = editor_of(fresh, contexts=Contexts.of(["{}", "I am. {}"]), **parts)
    loaded.load(tmp_path / "run")
    for each in (editor, loaded):
        each.fit(requests[6:8], 2, evaluate=False, run_dir=tmp_path / f"later {each is editor}")
    assert state(fresh, loaded.module) == state(lm, editor.module)


def test_single_facts_of_a_gradient_are_not_taken_back(lm, requests, tmp_path):
    editor = fit(lm, requests[:4], tmp_path / "run", **STREAMS["gradient"])
    before = state(lm, editor.module)
    with pytest.raises(ConfigError, match=r"NormalizedGradient takes back whole batches only: rollback\(batch=0\)"):
        editor.undo(requests[1].text)
    assert (state(lm, editor.module), len(editor.journal)) == (before, 2)
    other = fit(copy.deepcopy(lm), requests[4:6], tmp_path / "other", **STREAMS["queue"])
    other.module.solver = STREAMS["gradient"]["solver"]
    with pytest.raises(ConfigError, match="an earlier batch was edited by another solver"):
        other.fit(requests[6:8], 2, evaluate=False, run_dir=tmp_path / "mixed")
