"""RECT and PRUNE on small matrices by hand, and in a fit: what the model gets is what they keep."""

import copy
import math

import lightning as L
import pytest
import torch
from cakeflow_restrain import Prune, Rect
from hypothesis import given, settings
from hypothesis import strategies as st
from journal.edits import bits, same
from tiny_runs import editor_of, state
from weight_streams import Stream

from cakeflow import (
    Contexts,
    EditDataModule,
    GradientSearch,
    LayerProblem,
    LeastSquares,
    LocateThenEdit,
    NullSpace,
    Solver,
)
from cakeflow.errors import ConfigError
from cakeflow.forward.keys import FactReader
from cakeflow.models import Site
from cakeflow.solvers import FromScratch

LAYERS = [1, 2, 4]


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem(weight, seed=0):
    d_out, d_in = weight.shape
    return LayerProblem(randn(3, d_in, seed=seed), randn(3, d_out, seed=seed + 1), weight, weight)


@given(st.integers(0, 99), st.sampled_from([0.05, 0.2, 0.4, 1.0]))
def test_rect_keeps_the_largest_relative_changes(seed, keep):
    weight = randn(4, 7, seed=seed + 50)
    full = LeastSquares(1.0).solve(problem(weight, seed)).dense
    update = Rect(LeastSquares(1.0), keep).solve(problem(weight, seed))
    kept = update.deferred.dense
    assert torch.equal(update.dense, full)
    chosen = kept != 0
    assert torch.equal(kept[chosen], full[chosen])
    dropped = int(28 * (1 - keep) + 1e-9)
    assert int(chosen.sum()) == 28 - dropped + (dropped > 0)
    ratio = (full / weight).abs()
    assert dropped == 0 or ratio[chosen].min() >= ratio[~chosen].max()
    masked = Rect(LeastSquares(1.0), keep, in_loop=True).solve(problem(weight, seed))
    assert masked.deferred is None
    assert torch.equal(masked.dense, kept)


def test_prune_by_hand():
    """Singular values 2e and 1/2 above an original whose largest is 2: log(2e) - log(2) + 2 = 3, and 1/2 as it is."""
    origin = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))
    change = torch.tensor([[0.0, 2 * math.e], [0.5, 0.0]], dtype=torch.float64)
    damped = torch.tensor([[0.0, 3.0], [0.5, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(Prune().finish(origin, origin + change), origin + damped)
    torch.testing.assert_close(Prune(base=math.e**2).finish(origin, origin + change)[0, 1], damped[0, 1] - 0.5)
    torch.testing.assert_close(Prune(double_add=True).finish(origin, origin + change), origin + change + damped)
    assert torch.equal(NullSpace(Prune()).finish(origin, origin + change), Prune().finish(origin, origin + change))


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.01, 1.0]),
    inner=st.sampled_from([LeastSquares(0.3), NullSpace(LeastSquares(0.3)), LeastSquares(0.3, "dual")]),
)
def test_a_stream_that_is_damped_behind_every_batch_is_one_batch_that_is_damped(sizes, seed, scale, inner):
    """Around ``FromScratch``: the last filter's error is all that parts it from one batch without a filter."""
    stream = Stream.of(sum(sizes), seed)
    stream.original *= scale  # a small one, so that changes are damped
    solver, changes = Prune(FromScratch(inner), every_batch=True), []

    class Filtered(Solver):
        def solve(self, problem):
            changes.append(solver.solve(problem))
            return changes[-1].deferred

    once, weight = stream.run(inner, [sum(sizes)])[0], stream.run(Filtered(), sizes)[0]
    error = changes[-1].deferred.dense - changes[-1].dense
    torch.testing.assert_close(weight - error, once, rtol=0, atol=1e-10)
    torch.testing.assert_close(weight, Prune(inner).finish(stream.original, once), rtol=0, atol=1e-10)
    assert solver.finish(stream.original, weight) is weight
    largest = torch.linalg.matrix_norm(once - stream.original, 2) > torch.linalg.matrix_norm(stream.original, 2)
    assert bool(error.norm() > 1e-6) == bool(largest)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Rect(keep=0.0), "keep must lie"),
        (lambda: Rect(keep=math.nan), "keep"),
        (lambda: Prune(base=1.0), "base"),
        (lambda: Prune(double_add=True, every_batch=True), "set it or every_batch to False"),
    ],
)
def test_bad_settings(build, words):
    with pytest.raises(ConfigError, match=words):
        build()


# ---- in a fit ----


def fit(lm, requests, quiet, solver, batch_size, kind=LocateThenEdit, history=False):
    width = lm.oriented(Site(0, "mlp_out")).shape[1]
    module = kind(
        lm,
        LAYERS,
        contexts=Contexts.of(["{}", "I am. {}"]),
        targets=GradientSearch(steps=4, lr=0.3),
        solver=solver,
        history=history,
        moments=dict.fromkeys(LAYERS, 1e-5 * torch.eye(width, dtype=torch.float64)),
        max_relative_update=float("inf"),
    )
    trainer = L.Trainer(**quiet)
    trainer.fit(module, datamodule=EditDataModule(requests, batch_size))
    return module, trainer.callback_metrics


def weights(lm):
    return {layer: lm.oriented(Site(layer, "mlp_out")).clone() for layer in LAYERS}


class Watched(LocateThenEdit):
    """Keeps the goal of the last batch."""

    def edit(self, batch, step):
        super().edit(batch, step)
        self.batch, self.goal, self.value_site = batch, step.values[LAYERS[-1]], Site(LAYERS[-1])


def test_rect_in_a_fit(tiny, requests, quiet):
    before, other = weights(tiny), copy.deepcopy(tiny)
    module, logged = fit(tiny, requests[:3], quiet, Rect(), 3, Watched)
    fit(other, requests[:3], quiet, LeastSquares(), 3)
    for layer in LAYERS:
        full, got = (
            other.oriented(Site(layer, "mlp_out")) - before[layer],
            tiny.oriented(Site(layer, "mlp_out")) - before[layer],
        )
        assert float((got != 0).double().mean()) == pytest.approx(0.4, abs=0.001)
        torch.testing.assert_close(got, torch.where(got != 0, full, 0.0), rtol=0, atol=1e-12)
        untouched = got == 0
        assert torch.equal(tiny.oriented(Site(layer, "mlp_out"))[untouched], before[layer][untouched])
    left = module.goal - FactReader(tiny, module.batch).values(Site(LAYERS[0], "mlp_out"), module.value_site)
    assert float(logged["target/left"]) == pytest.approx(float(left.norm(dim=1).mean()), rel=1e-5)
    module.journal.rollback()
    assert all(torch.equal(tiny.oriented(Site(layer, "mlp_out")), weight) for layer, weight in before.items())


def test_a_mask_in_the_loop_is_seen_by_later_layers(lm, requests, quiet):
    other = copy.deepcopy(lm)
    fit(lm, requests[:3], quiet, Rect(in_loop=True), 3)
    fit(other, requests[:3], quiet, Rect(), 3)
    assert torch.equal(lm.oriented(Site(LAYERS[0], "mlp_out")), other.oriented(Site(LAYERS[0], "mlp_out")))
    assert not torch.equal(lm.oriented(Site(LAYERS[1], "mlp_out")), other.oriented(Site(LAYERS[1], "mlp_out")))


def test_prune_in_a_fit(tiny, requests, quiet):
    with torch.no_grad():  # originals that are small beside the changes
        for layer in LAYERS:
            tiny.weight(Site(layer, "mlp_out")).mul_(0.01)
    before, other = weights(tiny), copy.deepcopy(tiny)
    module, _ = fit(tiny, requests[:4], quiet, Prune(), 2)
    plain, _ = fit(other, requests[:4], quiet, LeastSquares(), 2)
    assert [len(step.requests) for step in module.journal] == [2, 2, 0]
    for layer in LAYERS:
        expected = Prune().finish(before[layer], other.oriented(Site(layer, "mlp_out")))
        assert not torch.allclose(expected, other.oriented(Site(layer, "mlp_out")))
        torch.testing.assert_close(tiny.oriented(Site(layer, "mlp_out")), expected, rtol=0, atol=1e-12)
    assert len(module.journal.history(tiny.weight_name(Site(LAYERS[0], "mlp_out")))) == 4
    module.journal.rollback(1)  # the last batch, and the damping that counted on it
    plain.journal.rollback(1)
    assert [len(step.requests) for step in module.journal] == [2]
    assert all(
        torch.equal(tiny.oriented(Site(layer, "mlp_out")), other.oriented(Site(layer, "mlp_out"))) for layer in LAYERS
    )
    module.journal.rollback()
    assert all(torch.equal(tiny.oriented(Site(layer, "mlp_out")), weight) for layer, weight in before.items())


def test_prune_behind_every_batch_in_a_fit(tiny, requests, quiet):
    """The weights are damped after every batch, and there is no step at the end of the run."""
    with torch.no_grad():  # originals that are small beside the changes
        for layer in LAYERS:
            tiny.weight(Site(layer, "mlp_out")).mul_(0.01)
    before, unedited = weights(tiny), copy.deepcopy(tiny)
    solver = Prune(FromScratch(LeastSquares(1.0)), every_batch=True)
    module, _ = fit(tiny, requests[:4], quiet, solver, 2, history=True)
    assert [len(step.requests) for step in module.journal] == [2, 2]
    for layer, original in before.items():
        history = module.journal.history(tiny.weight_name(Site(layer, "mlp_out")))
        residual = history.values - history.keys @ original.T
        whole = LayerProblem(history.keys, residual, original, original, module.covariances[layer])
        once = original + LeastSquares(1.0).solve(whole).dense
        expected = Prune().finish(original, once)
        assert not torch.allclose(expected, once)
        torch.testing.assert_close(tiny.oriented(Site(layer, "mlp_out")), expected, rtol=0, atol=1e-10)
    module.journal.rollback()
    assert same(tiny, bits(unedited))


def test_a_plain_solver_adds_no_step(lm, requests, quiet):
    module, _ = fit(lm, requests[:2], quiet, LeastSquares(), 1)
    assert len(module.journal) == 2


@pytest.mark.filterwarnings("ignore:the run was stopped")
def test_a_run_that_was_stopped_has_no_last_word_and_goes_on(lm, requests, tmp_path):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    whole, first = (copy.deepcopy(lm) for _ in range(2))
    editors = [editor_of(each, solver=Prune(LeastSquares(1.0))) for each in (whole, lm)]
    editors[0].fit(requests[:4], 2, evaluate=False, run_dir=tmp_path / "whole")
    stopped = editor_of(first, {"callbacks": [Stop()]}, solver=Prune(LeastSquares(1.0)))
    stopped.fit(requests[:4], 2, evaluate=False, run_dir=tmp_path / "run")
    assert [step.completes for step in stopped.journal] == [False]
    editors[1].fit(requests[:4], 2, evaluate=False, run_dir=tmp_path / "run")
    assert [step.completes for step in editors[1].journal] == [step.completes for step in editors[0].journal]
    assert state(lm, editors[1].module) == state(whole, editors[0].module)
