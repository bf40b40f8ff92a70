"""Residuals of far facts are scaled: candidates by hand, the choice among them, and the whole method in a fit."""

import copy
import math
from dataclasses import dataclass, replace

import lightning as L
import pytest
import torch
from cakeflow_streams import ConflictHistory, RankSearch, ResidualBlend
from cakeflow_streams.blend import shares
from cakeflow_streams.conflict import harmony
from hypothesis import given
from hypothesis import strategies as st
from layer_problems import LayerCase, close

from cakeflow import Contexts, EditDataModule, Editor, GradientSearch, LeastSquares, LocateThenEdit, NullSpace, Solver
from cakeflow.core.callback import EditCallback
from cakeflow.errors import ConfigError, NumericalError, ShapeError
from cakeflow.models import Site
from cakeflow.solvers import EqualityConstrained
from cakeflow.testing import SolverContract

PLAIN = NullSpace(LeastSquares(0.5))
LAYERS = [1, 2, 4]


def blend(choose="loss", radius=3.0, inner=PLAIN):
    return ResidualBlend(inner, radius, choose)


class TestContract(SolverContract):
    solver = ResidualBlend(LeastSquares(1.0))


@given(n=st.integers(1, 5), seed=st.integers(0, 999), radius=st.sampled_from([0.1, 3.0, 4.0, 100.0]))
def test_candidates_scale_the_residuals_of_far_facts(n, seed, radius):
    """R_t = R diag(1 - beta_t m), with beta_t = (10 - t) / 20 and m = [|gap| > radius]: linear in beta_t."""
    case = LayerCase(n, seed=seed)
    far = [float(gap.norm()) > radius for gap in case.problem.gap]
    for t in range(11):
        R = torch.stack([row * (1 - (10 - t) / 20 if each else 1) for row, each in zip(case.R, far, strict=True)])
        update = blend(t, radius).solve(case.problem)
        close(update.dense, PLAIN.solve(replace(case.problem, residual=R)).dense)
        assert all(torch.equal(update.left[i], case.R[i]) for i, each in enumerate(far) if not each)
        assert update.numbers["residual_share"] == (1 - (10 - t) / 20 if any(far) else 1)
        assert not update.is_plain
    assert len(shares(case.problem.gap, radius)) == (11 if any(far) else 1)


def test_a_gap_of_exactly_the_radius_is_not_far():
    gap = torch.tensor([[3.0, 4.0], [3.0, 4.1]], dtype=torch.float64)
    assert shares(gap, 5.0)[0].tolist() == [1.0, 0.5]


def test_the_inner_solver_sees_the_whole_residual():
    """A rank that was chosen with less would be another one."""
    case = LayerCase(seed=3)
    search = RankSearch(LeastSquares(0.5), theta=0.02, block=1)
    full = search.solve(case.problem)
    update = blend(0, 0.1, search).solve(case.problem)
    assert update.numbers["rank"] == full.numbers["rank"] > case.null
    assert update.numbers["price"] == pytest.approx(full.numbers["price"] / 4, rel=1e-12)
    close(update.dense, full.dense / 2)


@dataclass
class Likes:
    """A loss that is least where the change is this part of the whole one; counts its calls."""

    whole: torch.Tensor
    part: float
    calls: int = 0

    def __call__(self, change):
        self.calls += 1
        return float((change - self.part * self.whole).norm()), change


@pytest.mark.parametrize(("part", "share"), [(0.0, 0.5), (0.5, 0.5), (0.76, 0.75), (1.0, 1.0), (2.0, 1.0)])
def test_the_candidate_of_least_loss_is_taken(part, share):
    problem = LayerCase().problem
    whole = PLAIN.solve(problem).dense
    loss = Likes(whole, part)
    update = blend(radius=0.1).solve(replace(problem, loss=loss))
    assert loss.calls == 11
    assert update.numbers["residual_share"] == share
    close(update.dense, share * whole)


def test_of_equals_the_largest_is_taken():
    """The official code takes the smallest: half of the edit."""
    problem = LayerCase().problem
    update = blend(radius=0.1).solve(replace(problem, loss=lambda change: (1.0, change)))
    assert torch.equal(update.dense, PLAIN.solve(problem).dense)
    losses = iter([5.0, 2.0, 2.0, 3.0, 2.0, *[4.0] * 6])
    update = blend(radius=0.1).solve(replace(problem, loss=lambda change: (next(losses), change)))
    assert update.numbers["residual_share"] == 0.7


def test_without_far_facts_there_is_nothing_to_choose():
    problem = replace(LayerCase().problem, loss=lambda _: pytest.fail("a candidate was tried"))
    for choose in ("loss", 0):
        update = blend(choose, 1e9).solve(problem)
        assert torch.equal(update.dense, PLAIN.solve(problem).dense)
    undone = replace(problem, gap=None)
    assert torch.equal(blend(0, 0.1).solve(undone).dense, PLAIN.solve(undone).dense)


@dataclass(frozen=True)
class Dense(Solver):
    inner: Solver = PLAIN

    def solve(self, problem):
        update = self.inner.solve(problem)
        return replace(update, right=update.dense, left=None)


def test_errors():
    problem = LayerCase().problem
    with pytest.raises(ConfigError, match="put ResidualBlend inside it"):
        blend(inner=Dense()).solve(problem)
    with pytest.raises(ConfigError, match="put ResidualBlend inside it"):
        blend(inner=blend(3, 0.1)).solve(problem)
    with pytest.raises(ShapeError, match="needs the model's loss"):
        blend(radius=0.1).solve(problem)
    with pytest.raises(NumericalError, match="not finite"):
        blend(radius=0.1).solve(replace(problem, loss=lambda change: (math.nan, change)))
    assert blend(3, 0.1, EqualityConstrained(PLAIN)).solve(LayerCase(n=2).problem).left is not None


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"radius": 0.0}, "radius must be above 0"), ({"choose": 11}, "0 to 10, got 11"), ({"choose": "best"}, "'best'")],
)
def test_bad_settings(settings, words):
    with pytest.raises(ConfigError, match=words):
        ResidualBlend(**settings)


# ---- in a fit ----


class Seen(EditCallback):
    """Problems and updates of every layer."""

    def __init__(self):
        self.solved = []

    def on_layer_solved(self, module, edit):
        self.solved.append((edit.problem, edit.update, len(edit.problem.history)))  # the history grows


def fit(lm, requests, quiet, solver, size=2, watch=None, targets=GradientSearch(steps=4, lr=0.3)):
    width, watch = lm.oriented(Site(0, "mlp_out")).shape[1], watch or Seen()
    moment = torch.diag(torch.linspace(0.001, 1, width, dtype=torch.float64))
    module = LocateThenEdit(
        lm, LAYERS, contexts=Contexts.of(["{}", "I am. {}"]), targets=targets, solver=solver,
        moments=dict.fromkeys(LAYERS, moment), max_relative_update=math.inf,
    )  # fmt: skip
    trainer = L.Trainer(**quiet, callbacks=[watch])
    trainer.fit(module, datamodule=EditDataModule(requests, size))
    return module, trainer.callback_metrics, getattr(watch, "solved", None)


def plus(radius=1e-9, choose="loss", theta=None):
    return ResidualBlend(ConflictHistory(RankSearch(LeastSquares(0.1), 0.1, theta=theta)), radius, choose)


def test_rank_price_and_share_are_logged(tiny, requests, quiet):
    module, logged, solved = fit(tiny, requests[:4], quiet, plus())
    for layer, (problem, update, _), change in zip(LAYERS, solved[3:], module.journal[-1].changes, strict=True):
        for name in ("rank", "price", "residual_share"):
            assert float(logged[f"layer{layer}/{name}"]) == pytest.approx(update.numbers[name], rel=1e-6)
            assert change.numbers[name] == update.numbers[name]
        D, C = update.dense, problem.covariance.moment
        assert update.numbers["price"] == pytest.approx(float((D @ C @ D.T).trace()), rel=1e-9)
        assert problem.index == LAYERS.index(layer)
        torch.testing.assert_close(problem.gap / (3 - problem.index), problem.residual)
        assert problem.covariance.rank(0.1) <= update.numbers["rank"] <= len(C)


class Losses(EditCallback):
    """Compares the share of a layer with the losses of all candidates, while the weights are as they were."""

    def __init__(self):
        self.chosen = []

    def on_layer_solved(self, module, edit):
        share, D = edit.update.numbers["residual_share"], edit.update.dense
        losses = {t: edit.problem.loss(D * (1 - (10 - t) / 20) / share)[0] for t in range(11)}
        self.chosen.append((share, 1 - (10 - min(losses, key=losses.get)) / 20))


def test_the_share_in_a_fit_is_that_of_least_loss(tiny, requests, quiet):
    """The searched values lie far beyond the best ones, so that less than all of the residual is better."""
    watch = Losses()
    fit(tiny, requests[:4], quiet, plus(), watch=watch, targets=GradientSearch(steps=2, lr=30.0, clamp=20.0))
    assert len(watch.chosen) == 6
    assert all(share == pytest.approx(least) for share, least in watch.chosen)
    assert min(share for share, _ in watch.chosen) == 0.5


def test_without_relaxing_weighing_and_blending_it_is_the_plain_method(tiny, requests, quiet):
    other = copy.deepcopy(tiny)
    fit(tiny, requests[:3], quiet, plus(1e9, theta=math.inf), 3)
    fit(other, requests[:3], quiet, NullSpace(LeastSquares(0.1), 0.1), 3)
    for layer in LAYERS:
        close(tiny.oriented(Site(layer, "mlp_out")), other.oriented(Site(layer, "mlp_out")), 1e-12)


def test_a_batch_that_is_taken_back_leaves_no_rows(lm, requests, quiet):
    other = copy.deepcopy(lm)
    module, _, _ = fit(lm, requests[:4], quiet, plus())
    plain, _, _ = fit(other, requests[:2], quiet, plus())
    module.journal.rollback(1)
    for layer in LAYERS:
        name = lm.weight_name(Site(layer, "mlp_out"))
        assert torch.equal(module.journal.history(name).keys, plain.journal.history(name).keys)
        assert torch.equal(lm.oriented(Site(layer, "mlp_out")), other.oriented(Site(layer, "mlp_out")))


@pytest.mark.parametrize(("solver", "rows"), [(plus(1e9), 2), (NullSpace(LeastSquares(0.1), 0.1), 1)])
def test_keys_that_come_again_stay_where_conflicts_are_weighed(lm, requests, quiet, solver, rows):
    """The second batch gives a fact another target: its old key has weight 0 below, and some where keys have moved."""
    module, _, _ = fit(lm, requests[:2], quiet, solver)
    again, watch = replace(requests[0], target_new=requests[1].target_new), Seen()
    trainer = L.Trainer(**quiet, callbacks=[watch])
    trainer.fit(module, datamodule=EditDataModule([again, requests[2]], 2))
    assert [count for *_, count in watch.solved] == [rows] * 3
    if rows == 2:
        old = [module.journal[0].changes[i].change.keys for i in range(3)]
        weights = [harmony(keys, problem.keys)[0] for keys, (problem, *_) in zip(old, watch.solved, strict=True)]
        assert float(weights[0]) < 1e-15
        assert float(weights[1]) > 1e-12


def test_a_fact_can_be_undone(lm, requests, quiet):
    """An undo has no gap: its loss would be that of the target that is taken back."""
    before = lm.oriented(Site(1, "mlp_out")).clone()
    width = before.shape[1]
    editor = Editor.from_pretrained(
        lm.model, "alphaedit_plus", tokenizer=lm.tokenizer, layers=LAYERS, contexts=Contexts(), trainer=quiet,
        targets=GradientSearch(steps=4, lr=0.3), solver=plus(1e-9, 0), on_low_arrival="warn",
        moments=dict.fromkeys(LAYERS, 1e-5 * torch.eye(width, dtype=torch.float64)),
    )  # fmt: skip
    editor.fit(requests[:2], evaluate=False)
    edited = editor.module.lm.oriented(Site(1, "mlp_out")).clone()
    assert "residual_share" in editor.journal[-1].changes[0].numbers
    editor.undo(requests[0].subject)
    assert not torch.equal(editor.module.lm.oriented(Site(1, "mlp_out")), edited)
    assert "residual_share" not in editor.journal[-1].changes[0].numbers
