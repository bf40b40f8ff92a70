"""The theory's quantities: on dense matrices by hand, and in a fit against plain forward passes."""

import copy
from dataclasses import dataclass, field

import lightning as L
import pytest
import torch
from cakeflow_theory.alignment import ScoreAlignment, alignment
from cakeflow_theory.theory import (
    ResidualDrift,
    ScoreDrift,
    WeightShiftBound,
    alone,
    score_drift,
    sensitivity,
    weight_shift_bound,
)
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import editor_of
from torchmetrics.functional import kendall_rank_corrcoef

from cakeflow import Contexts, EditDataModule, GradientSearch, LayerProblem, LeastSquares, LocateThenEdit, Sequential
from cakeflow.allocators import Jacobian, LayerContext
from cakeflow.core.callback import EditCallback, LayerEdit
from cakeflow.errors import NumericalError
from cakeflow.forward.generation import continuations
from cakeflow.models.architecture import Site
from cakeflow.testing import DenseLinearMap
from cakeflow.tracing import CausalTrace, Fact
from cakeflow.tracing.facts import text_before

N, D_OUT, D_IN, LAYERS = 3, 5, 7, [1, 2, 4]


def edit(seed, spread, index=0):
    """The first of three layers, whose M is I + spread * noise."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    eye = torch.eye(D_OUT, dtype=torch.float64)
    matrices = [eye + spread * normal(N, D_OUT, D_OUT) / D_OUT**0.5 for _ in range(2)] + [eye.expand(N, -1, -1)]
    weights = torch.rand(3, generator=gen, dtype=torch.float64) + 0.1
    context = LayerContext(Site(1, "mlp_out"), Site(4), index, weights, DenseLinearMap(matrices[index:]))
    missing = normal(N, D_OUT)
    share = Sequential().allocate(missing, context)
    weight = normal(D_OUT, D_IN)
    problem = LayerProblem(normal(N, D_IN), share, weight, weight)
    return LayerEdit(context, None, missing, share, problem, LeastSquares(ridge=0.5).solve(problem)), matrices


@given(st.integers(0, 200), st.floats(0, 0.4))
def test_theorem_2_holds(seed, spread):
    result, matrices = edit(seed, spread)
    share = Sequential().shares(result.context.weights)[0]
    reached = alone(result, tolerance=1e-12)
    bound = weight_shift_bound(result, share, reached)
    ideal = torch.linalg.solve(matrices[0], result.residual)
    torch.testing.assert_close(reached, ideal, rtol=0, atol=1e-6)
    wider = matrices[0] @ matrices[0].mT + 0.1 * torch.eye(D_OUT, dtype=torch.float64)
    damped = (matrices[0].mT @ torch.linalg.solve(wider, result.residual)[..., None])[..., 0]
    torch.testing.assert_close(alone(result, 0.1, tolerance=1e-12), damped, rtol=0, atol=1e-6)
    error = torch.linalg.matrix_norm((ideal - result.problem.residual).T @ result.update.right, 2)
    assert bound.error == pytest.approx(float(error), rel=1e-5, abs=1e-9)
    assert bound.mismatch == pytest.approx(float(torch.linalg.matrix_norm(ideal - result.residual, 2)), abs=1e-6)
    assert bound.error <= bound.limit * (1 + 1e-9)


def test_theorem_2_when_every_layer_reaches_the_anchor_unchanged():
    result, _ = edit(0, 0.0)
    share = float(Sequential().shares(result.context.weights)[0])
    bound = weight_shift_bound(result, torch.tensor(share), alone(result))
    assert bound.mismatch == pytest.approx(0, abs=1e-9)
    assert bound.propagation == pytest.approx((1 - share) * float(torch.linalg.matrix_norm(result.residual, 2)))
    assert bound.error == pytest.approx(
        (1 - share) * float(torch.linalg.matrix_norm(result.residual.T @ result.update.right, 2))
    )
    assert sensitivity(result.context.linear_map, result.residual)[0] == pytest.approx(0, abs=1e-12)


def test_sensitivity_is_the_distance_from_the_identity():
    result, matrices = edit(3, 0.3)
    exact = float((matrices[0] - torch.eye(D_OUT)).square().sum((1, 2)).mean() / D_OUT) ** 0.5
    assert sensitivity(result.context.linear_map, result.residual, draws=4000)[0] == pytest.approx(exact, rel=0.05)


# ---- in a fit ----


def at_subjects(lm, rows, site, side="out"):
    """What a site holds at each row's subject, by full forward passes."""
    held = []

    def keep(row, value):
        held.append((value[0] if isinstance(value, tuple) else value)[0, row.subject])

    for row in rows:
        handle = lm.module(site).register_forward_hook(
            lambda _m, args, out, row=row: keep(row, args if side == "in" else out)
        )
        with torch.no_grad():
            lm.model(input_ids=torch.tensor([row.ids]), use_cache=False)
        handle.remove()
    return torch.stack(held)


class Plain(EditCallback):
    """What is missing at the anchor, by full forward passes over the bare prompts."""

    def __init__(self):
        self.residual, self.shares = [], []

    def measure(self, module):
        rows = [variants[0] for variants in module.batch.rows]
        self.residual.append(module.goal - at_subjects(module.lm, rows, Site(LAYERS[-1])))

    def on_layer_solved(self, module, edit):
        self.measure(module)
        self.shares.append(edit.problem.residual)

    def on_batch_edited(self, module, left):
        self.measure(module)


class Spied(LocateThenEdit):
    """Keeps the batch and the target values."""

    def edit(self, batch, step):
        self.batch, self.step = batch, step
        super().edit(batch, step)

    @property
    def goal(self):
        return self.step.values[LAYERS[-1]]


def fit(lm, requests, quiet, callbacks, kind=LocateThenEdit, **changes):
    width = lm.key_width(Site(0, "mlp_out"))
    module = kind(
        lm,
        **{
            "layers": LAYERS,
            "contexts": Contexts.of(["{}", "I am. {}"]),
            "targets": GradientSearch(steps=4, lr=0.3),
            "solver": LeastSquares(1.0),
            "moments": dict.fromkeys(LAYERS, torch.eye(width, dtype=torch.float64)),
            **changes,
        },
    )
    trainer = L.Trainer(**{**quiet, "callbacks": callbacks})
    trainer.fit(module, datamodule=EditDataModule(requests, len(requests)))
    return trainer.callback_metrics


def test_drift_equals_full_passes(tiny, requests, quiet):
    plain = Plain()
    logged = fit(tiny, requests[:4], quiet, [ResidualDrift(), plain], Spied)
    total = 0.0
    for index, layer in enumerate(LAYERS):
        actual = plain.residual[index] - plain.residual[index + 1]
        expected = float((actual - plain.shares[index]).norm(dim=1).mean())
        assert expected > 1e-3
        assert float(logged[f"layer{layer}/drift"]) == pytest.approx(expected, rel=1e-5)
        total += expected
    assert float(logged["drift"]) == pytest.approx(total, rel=1e-5)
    assert float(logged["target/left"]) == pytest.approx(float(plain.residual[-1].norm(dim=1).mean()), rel=1e-5)


@dataclass(frozen=True)
class FailsOnce(LeastSquares):
    """Fails at the second layer of the first batch."""

    failed: list = field(default_factory=list)

    def solve(self, problem):
        if problem.index == 1 and not self.failed:
            self.failed.append(True)
            raise NumericalError("no")
        return super().solve(problem)


def test_a_batch_that_failed_leaves_nothing_for_the_drift_of_the_next(lm, requests, quiet):
    fresh, callback = copy.deepcopy(lm), ResidualDrift()
    with pytest.raises(NumericalError, match="no"):
        fit(lm, requests[:3], quiet, [callback], solver=FailsOnce(1.0))
    again = fit(lm, requests[:2], quiet, [callback])
    assert float(again["drift"]) == float(fit(fresh, requests[:2], quiet, [ResidualDrift()])["drift"])


def test_no_common_residual_no_drift(lm, requests, quiet):
    logged = fit(lm, requests[:2], quiet, [ResidualDrift()], allocator=Sequential(power=0, residual_at="self"))
    assert "drift" not in logged


@pytest.mark.filterwarnings("error:.*theorem 2")
def test_both_sides_of_theorem_2_are_logged(lm, requests, quiet):
    logged = fit(lm, requests[:3], quiet, [WeightShiftBound()])
    for layer in LAYERS:
        assert 0 <= float(logged[f"layer{layer}/shift_error"]) <= float(logged[f"layer{layer}/shift_limit"])
    assert float(logged["layer4/sensitivity"]) == 0
    assert float(logged["layer1/sensitivity"]) > 0.01


def test_what_cannot_be_measured_leaves_the_edit_alone(lm, requests, quiet):
    with pytest.warns(UserWarning, match="WeightShiftBound measured nothing"):
        logged = fit(lm, requests[:2], quiet, [WeightShiftBound(tolerance=1e-12, iterations=1)])
    assert "layer1/shift_error" not in logged
    assert float(logged["target/left"]) > 0


def test_an_exact_allocation_has_sensitivities_only(lm, requests, quiet):
    logged = fit(lm, requests[:2], quiet, [WeightShiftBound()], allocator=Jacobian())
    assert "layer1/sensitivity" in logged
    assert "layer1/shift_error" not in logged


def test_scores_before_and_after(lm, requests, quiet, monkeypatch, tmp_path):
    monkeypatch.setenv("CAKEFLOW_CACHE", str(tmp_path))
    prompts = [Fact("The sea of {} is", name, "x") for name in ("Ann", "Bob", "Lund")]
    said = continuations(lm, [fact.text for fact in prompts], 8)
    facts = [Fact(f.prompt, f.subject, text.split()[0]) for f, text in zip(prompts, said, strict=True)]
    assert any(text_before(text, fact.object) is not None for fact, text in zip(facts, said, strict=True))
    callback = ScoreDrift(facts, trace=CausalTrace(draws=2))
    logged = fit(lm, requests[:2], quiet, [callback])
    before = callback._before
    after = CausalTrace(draws=2, noise=before.settings["noise"]).run(lm, callback._rows, LAYERS)
    assert float(logged["score_drift"]) == pytest.approx(score_drift(before, after), rel=1e-6)
    assert score_drift(before, after) > 0


def test_a_second_run_is_compared_with_the_unedited_model_too(lm, requests, monkeypatch, tmp_path):
    monkeypatch.setenv("CAKEFLOW_CACHE", str(tmp_path))
    prompts = [Fact("The sea of {} is", name, "x") for name in ("Ann", "Bob", "Lund")]
    said = continuations(lm, [fact.text for fact in prompts], 8)
    facts = [Fact(f.prompt, f.subject, text.split()[0]) for f, text in zip(prompts, said, strict=True)]
    callback = ScoreDrift(facts, trace=CausalTrace(draws=2))
    editor = editor_of(lm, {"callbacks": [callback], "logger": False})
    editor.fit(requests[:2], evaluate=False)
    before = callback._before.scores
    editor.fit(requests[2:4], evaluate=False)
    assert callback._before.scores == before


class Alone(EditCallback):
    """What remains when one layer takes everything, for each fact, by hand."""

    def on_layer_solved(self, module, edit):
        if edit.context.index:
            return
        rows = [variants[0] for variants in edit.batch.rows]
        self.left = torch.zeros(len(rows), len(LAYERS), dtype=torch.float64)
        for i, row in enumerate(rows):
            for j, layer in enumerate(LAYERS):
                (key,) = at_subjects(module.lm, [row], Site(layer, "mlp_out"), "in")
                missing = edit.residual[i]
                weight = module.lm.oriented(Site(layer, "mlp_out"))
                kept = weight.clone()
                weight += torch.outer(missing, key) / (1 + key @ key)  # least squares with ridge 1 and one key
                self.left[i, j] = (module.goal[i] - at_subjects(module.lm, [row], Site(LAYERS[-1]))[0]).norm()
                self.left[i, j] /= missing.norm()
                weight.copy_(kept)


def test_alignment_is_that_of_single_layer_edits(tiny, requests, quiet, monkeypatch, tmp_path):
    monkeypatch.setenv("CAKEFLOW_CACHE", str(tmp_path))
    plain, trace, width = Alone(), CausalTrace(draws=2, noise=0.5), tiny.key_width(Site(0, "mlp_out"))
    changes = {"contexts": Contexts(), "moments": dict.fromkeys(LAYERS, torch.zeros(width, width, dtype=torch.float64))}
    logged = fit(tiny, requests[:3], quiet, [plain, ScoreAlignment(trace)], Spied, **changes)
    for layer, expected in zip(LAYERS, plain.left.mean(0).tolist(), strict=True):
        assert float(logged[f"layer{layer}/left_alone"]) == pytest.approx(expected, rel=1e-5)
    depth = torch.tensor(LAYERS, dtype=torch.float64).expand_as(plain.left)
    assert float(logged["alignment_of_depth"]) == pytest.approx(float(alignment(depth, plain.left).mean()), abs=1e-6)
    assert -1 <= float(logged["alignment"]) <= 1


@given(st.integers(2, 6), st.integers(2, 6), st.integers(0, 50))
def test_alignment_is_kendalls_tau_b(n, layers, seed):
    gen = torch.Generator().manual_seed(seed)
    scores, mismatch = (torch.randint(0, 5, (n, layers), generator=gen).double() for _ in range(2))
    expected = kendall_rank_corrcoef(scores.T, -mismatch.T)
    torch.testing.assert_close(alignment(scores, mismatch), expected.double(), rtol=0, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(
        alignment(scores[:1], mismatch[:1]), expected[:1].double(), rtol=0, atol=1e-6, equal_nan=True
    )


def test_no_common_residual_no_alignment(lm, requests, quiet):
    logged = fit(lm, requests[:2], quiet, [ScoreAlignment()], allocator=Sequential(power=0, residual_at="self"))
    assert "alignment" not in logged
