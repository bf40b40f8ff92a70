"""The penalty by hand, and HSE as a whole: what it is without its parts, and that the journal carries its state."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from cakeflow_streams import FisherPenalty, Forgetting
from cakeflow_streams.importance import scaled
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import LAYERS, StopAfter, content, editor_of, name_of, state

from cakeflow import Contexts, GradientSearch, LeastSquares
from cakeflow.errors import RequestWarning
from cakeflow.forward.tokens import encode_batch
from cakeflow.journal.audit import verify
from cakeflow.journal.steps import importance_at
from cakeflow.models.architecture import Site
from cakeflow.models.hooks import frozen
from cakeflow.solvers import PlannedHistory
from cakeflow.targets import LossBelow, Objective, SearchProblem, Targets, TargetSearch
from cakeflow.testing import ObjectiveTermContract, TargetSearchContract

WIDTH = 48
TERMS = (Forgetting(0.2, floor=0.0), FisherPenalty(0.5))
SEARCH = GradientSearch(steps=4, lr=0.3, further=TERMS)


class TestFisherPenaltyBeforeTheFirstFact(ObjectiveTermContract):
    term = FisherPenalty(0.7)


@dataclass(frozen=True)
class Later(FisherPenalty):
    """The penalty after some facts."""

    def prepare(self, problem):
        importance = torch.linspace(1.0, 3.0, problem.initial.shape[2], dtype=torch.float64)
        return super().prepare(replace(problem, importance=importance))


class TestFisherPenalty(ObjectiveTermContract):
    term = Later(0.7)


class TestOneByOne(TargetSearchContract):
    search = GradientSearch(steps=4, one_by_one=True)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def evaluate(lm, requests, importance, delta, factor=0.7):
    problem = SearchProblem.prepare(lm, encode_batch(lm, requests, Contexts()), [Site(2)], 40, importance)
    with frozen(lm):
        objective = Objective({"penalty": FisherPenalty(factor).prepare(problem)})
        return objective.evaluate(delta, torch.zeros(len(requests), dtype=torch.bool), with_grad=True)


# ---- the term ----


@pytest.mark.parametrize("seed", range(3))
def test_the_penalty_and_its_gradient(lm, requests, seed):
    """``phi / 2 sum F delta^2`` and ``phi F delta``, F scaled by its minimum and maximum."""
    importance, delta = randn(WIDTH, seed=seed).square() * 1e-3, randn(3, 1, WIDTH, seed=seed + 10)
    value = evaluate(lm, requests[:3], importance, delta)
    low, high = importance.min(), importance.max()
    F = (importance - low) / (high - low)
    torch.testing.assert_close(value.loss, 0.7 * 0.5 * (F * delta[:, 0] ** 2).sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(value.grad, 0.7 * F * delta, rtol=1e-12, atol=1e-15)
    assert float(value.loss.max()) <= 0.7 * 0.5 * float(delta.square().sum(2).max())


def test_at_no_vector_there_is_no_gradient(lm, requests):
    value = evaluate(lm, requests[:2], randn(WIDTH), torch.zeros(2, 1, WIDTH, dtype=torch.float64))
    assert float(value.grad.abs().max()) == float(value.loss.abs().max()) == 0


@pytest.mark.parametrize("importance", [None, torch.full((WIDTH,), 0.3).double(), torch.zeros(WIDTH).double()])
def test_before_the_first_fact_and_for_equal_directions_there_is_no_penalty(lm, requests, importance):
    value = evaluate(lm, requests[:2], importance, randn(2, 1, WIDTH))
    assert float(value.grad.abs().max()) == float(value.loss.abs().max()) == 0


@given(a=st.floats(1e-3, 1e3), b=st.floats(-10, 10), seed=st.integers(0, 99))
def test_scale_and_offset_of_the_importance_do_not_matter(a, b, seed):
    importance = randn(WIDTH, seed=seed)
    torch.testing.assert_close(scaled(a * importance + b), scaled(importance), rtol=1e-9, atol=1e-10)


# ---- what a search finds important ----


@pytest.fixture
def facts(requests):
    olds = ["high", "Paul Verlaine", "Rome", "cap", "high", "Rome"]
    return [replace(request, target_true=old) for request, old in zip(requests[1:7], olds, strict=True)]


def gradients(lm, facts, importance, layer, lr, clamp, steps):
    """Gradients of the whole objective along a plain Adam, one vector for all facts of a group; with its radius."""
    settings = replace(SEARCH, steps=steps, lr=lr, clamp=clamp)
    problem = SearchProblem.prepare(lm, encode_batch(lm, facts, Contexts()), [Site(layer)], 1024, importance)
    objective = Objective({str(i): term.prepare(problem) for i, term in enumerate(settings._terms.values())})
    delta, nobody = torch.zeros_like(problem.initial[:1], requires_grad=True), torch.zeros(len(facts), dtype=torch.bool)
    adam, result = torch.optim.Adam([delta], lr=lr), []
    with frozen(lm):
        for _ in range(steps - 1):
            copies = delta.detach().expand(len(facts), -1, -1).clone()
            delta.grad = objective.evaluate(copies, nobody, with_grad=True).grad.sum(0, keepdim=True)
            result.append(delta.grad[0, 0].clone())
            adam.step()
            length, radius = delta.detach().norm(), clamp * float(problem.initial[0].norm())
            if float(length) > radius:
                delta.data *= radius / length
    return torch.stack(result)


@pytest.mark.parametrize("importance", [None, randn(WIDTH, seed=5).square()], ids=["first", "later"])
def test_it_is_the_mean_squared_gradient_along_the_search(tiny, facts, importance):
    settings = replace(SEARCH, stop=LossBelow(-1.0))
    targets = settings.search(tiny, encode_batch(tiny, facts[:3], Contexts()), 2, importance=importance)
    assert targets.importance.dtype == torch.float64
    for index, fact in enumerate(facts[:3]):
        want = gradients(tiny, [fact], importance, 2, 0.3, 0.75, 4).square().mean(0)
        torch.testing.assert_close(targets.importance[index], want, rtol=1e-6, atol=1e-15)


def test_a_vector_of_several_facts_counts_once(lm, facts):
    """Two facts with one prompt: the squared gradient of the sum of their objectives, in the first one's row."""
    pair = [facts[0], replace(facts[0], target_new="goalkeeper")]
    settings = replace(SEARCH, stop=LossBelow(-1.0))
    batch = encode_batch(lm, [*pair, facts[2]], Contexts())
    result = settings.search(lm, batch, 2).importance
    want = gradients(lm, pair, None, 2, 0.3, 0.75, 4).square().mean(0)
    torch.testing.assert_close(result[0], want, rtol=1e-8, atol=1e-15)
    assert float(result[1].abs().max()) == 0
    torch.testing.assert_close(result[2:], settings.search(lm, batch.part([2]), 2).importance, rtol=1e-8, atol=1e-15)


def test_nothing_is_important_where_no_step_was_made(tiny, facts):
    batch = encode_batch(tiny, facts, Contexts())
    full = SEARCH.search(tiny, batch, 2)
    assert (full.importance >= 0).all()
    assert (full.importance.sum(1) > 0).all()
    first = SEARCH.measure(tiny, batch, 2)
    assert float(first.importance.abs().max()) == 0
    middle = float(first.loss.median()) + 1e-9
    some = replace(SEARCH, stop=LossBelow(middle)).search(tiny, batch, 2)
    assert torch.equal(some.importance.sum(1) == 0, first.loss < middle)
    assert torch.equal(some.steps == 1, first.loss < middle)


def test_the_first_step_does_not_see_the_importance(lm, facts):
    batch, settings = encode_batch(lm, facts, Contexts()), replace(SEARCH, steps=2)
    free, bound = (settings.search(lm, batch, 2, importance=each) for each in (None, randn(WIDTH).square()))
    assert torch.equal(free.values, bound.values)
    later = [replace(SEARCH, steps=4).search(lm, batch, 2, importance=each) for each in (None, randn(WIDTH).square())]
    assert not torch.allclose(later[0].values, later[1].values)


def test_one_by_one_hands_on_what_earlier_facts_found_important(tiny, facts):
    batch, total = encode_batch(tiny, facts[:4], Contexts()), randn(WIDTH).square()
    result = replace(SEARCH, one_by_one=True).search(tiny, batch, 2, importance=total)
    for index in range(4):
        alone = SEARCH.search(tiny, batch.part([index]), 2, importance=total)
        assert torch.equal(result.values[index], alone.values[0])
        assert torch.equal(result.importance[index], alone.importance[0])
        total = total + alone.importance[0]
    at_once = SEARCH.search(tiny, batch, 2)
    assert not torch.allclose(at_once.values[3], result.values[3])


def test_without_the_penalty_the_order_does_not_matter(lm, facts):
    settings, batch = replace(SEARCH, further=()), encode_batch(lm, [*facts[:3], facts[0]], Contexts())
    at_once, in_turn = (replace(settings, one_by_one=each).search(lm, batch, 2) for each in (False, True))
    torch.testing.assert_close(in_turn.values, at_once.values, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(in_turn.importance, at_once.importance, rtol=1e-8, atol=1e-15)


def test_a_search_needs_importance_if_a_term_does():
    class Wrapped(TargetSearch):
        inner = replace(SEARCH, one_by_one=True)

        def search(self, lm, batch, layer, **options):
            raise NotImplementedError

        measure = search

    assert SEARCH.needs_importance
    assert Wrapped().needs_importance
    assert Wrapped().one_by_one
    assert not replace(SEARCH, further=(Forgetting(),)).needs_importance
    assert not SEARCH.one_by_one


def test_targets_without_importance_are_joined_and_updated_too(lm, facts):
    targets = SEARCH.search(lm, encode_batch(lm, facts[:3], Contexts()), 2)
    assert torch.equal(Targets.join([targets, targets], [[1, 3, 5], [0, 2, 4]]).importance[1::2], targets.importance)
    bare = replace(targets, importance=None)
    assert Targets.join([bare, bare]).importance is None
    assert bare.updated([0, 1, 2], bare).importance is None


# ---- as a whole ----

PARTS = {"targets": SEARCH, "solver": PlannedHistory(LeastSquares(0.5), planned=8)}
MEMIT_SEQ = {"targets": GradientSearch(steps=4, lr=0.3), "solver": LeastSquares(0.5)}


def edited(lm, facts, size, **parts):
    editor = editor_of(lm, {"logger": False}, **{**PARTS, **parts})
    editor.fit(facts, size, evaluate=False)
    return editor


def test_without_its_parts_it_is_memit_with_a_history(tiny, facts):
    nothing = replace(SEARCH, further=(Forgetting(0.0), FisherPenalty(0.0)))
    plain, other = copy.deepcopy(tiny), copy.deepcopy(tiny)
    with pytest.warns(RequestWarning, match="more than the 3 planned keys"):
        edited(tiny, facts, 3, targets=nothing, solver=PlannedHistory(LeastSquares(0.5), planned=3))
    edited(plain, facts, 3, **MEMIT_SEQ)
    assert tiny.fingerprint() == plain.fingerprint()
    edited(other, facts, 3)
    assert other.fingerprint() != plain.fingerprint()


def test_the_first_batch_is_memit_on_its_target_values(tiny, facts):
    class Fixed(TargetSearch):
        inner = SEARCH

        def search(self, lm, batch, layer, **options):
            return replace(targets, values=editor.journal[0].values[layer])

        measure = search

    plain = copy.deepcopy(tiny)
    targets = SEARCH.search(plain, encode_batch(plain, facts, Contexts()), LAYERS[-1])
    editor = edited(tiny, facts, None)
    edited(plain, facts, None, targets=Fixed(), solver=LeastSquares(0.5))
    assert tiny.fingerprint() == plain.fingerprint()


def alpha_outer(editor, layer):
    """Alpha S of HSE's solve at a layer."""
    history = editor.journal.history(name_of(editor.module.lm, layer))
    return editor.module.solver.factor(len(history)) * history.outer()


def total(editor):
    return importance_at(editor.journal, LAYERS[-1])


def test_the_journal_has_what_every_batch_found_important(tiny, facts):
    editor = edited(tiny, facts, 2)
    assert [set(step.importance) for step in editor.journal] == [{LAYERS[-1]}] * 3
    rows = torch.cat([step.importance[LAYERS[-1]] for step in editor.journal])
    assert rows.shape == (6, WIDTH)
    torch.testing.assert_close(total(editor), rows.sum(0))
    editor.rollback()
    assert total(editor) is None


def test_no_search_stores_what_no_term_needs(lm, facts):
    assert [step.importance for step in edited(lm, facts, 3, **MEMIT_SEQ).journal] == [{}, {}]


def test_taking_a_batch_back_restores_importance_history_and_alpha(tiny, facts):
    first = copy.deepcopy(tiny)
    short, editor = edited(first, facts[:4], 2), edited(tiny, facts, 2)
    assert not torch.equal(total(editor), total(short))
    weights = tiny.fingerprint()
    editor.rollback(1)
    for layer in LAYERS:
        assert torch.equal(alpha_outer(editor, layer), alpha_outer(short, layer))
    assert torch.equal(total(editor), total(short))
    assert tiny.fingerprint() == first.fingerprint()
    editor.fit(facts[4:], evaluate=False)
    assert tiny.fingerprint() == weights
    editor.rollback(batch=0)
    left = [step.importance[LAYERS[-1]].sum(0) for step in editor.journal]
    assert torch.equal(total(editor), left[0] + left[1])


@pytest.mark.parametrize("order", [False, True], ids=["batch", "one by one"])
@pytest.mark.parametrize("stop", [1, 2])
def test_a_run_that_goes_on_gives_the_same_bits(lm, facts, tmp_path, stop, order):
    whole, parts = copy.deepcopy(lm), {**PARTS, "targets": replace(SEARCH, one_by_one=order)}
    editor_of(whole, **parts).fit(facts, 2, evaluate=False, run_dir=tmp_path / "whole")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        editor_of(copy.deepcopy(lm), {"callbacks": [StopAfter(stop)]}, **parts).fit(
            facts, 2, evaluate=False, run_dir=tmp_path / "run"
        )
    editor = editor_of(lm, **parts)
    editor.fit(facts, 2, evaluate=False, run_dir=tmp_path / "run")
    assert lm.fingerprint() == whole.fingerprint()
    files = content(tmp_path / "whole/journal")
    again = content(tmp_path / "run/journal")
    assert {name: each for name, each in again.items() if name.endswith(".safetensors")} == {
        name: each for name, each in files.items() if name.endswith(".safetensors")
    }
    assert verify(tmp_path / "run").faults == []


def test_a_journal_that_was_loaded_goes_on_with_the_same_importance(lm, facts, tmp_path):
    fresh = copy.deepcopy(lm)
    editor = edited(lm, facts[:4], 2)
    editor.journal.save(tmp_path / "saved")
    other = editor_of(fresh, {"logger": False}, **PARTS)
    other.journal.load(tmp_path / "saved")
    assert torch.equal(total(other), total(editor))
    for each in (editor, other):
        each.fit(facts[4:], evaluate=False)
    assert state(fresh, other.module) == state(lm, editor.module)


def test_undoing_a_fact_adds_nothing_and_leaves_its_share(lm, facts):
    """As the history keeps its key: what was important for it stays protected until its batch is taken back."""
    editor = edited(lm, facts[:4], 2, solver=PlannedHistory(LeastSquares(1e-9), planned=8), targets=SEARCH)
    before = total(editor)
    editor.undo(facts[0].subject)
    assert editor.journal[-1].importance == {}
    assert torch.equal(total(editor), before)


def test_a_further_walk_puts_what_it_found_in_the_place_of_the_first(lm, facts):
    once, again = (edited(copy.deepcopy(lm), facts[:3], None, rounds=rounds) for rounds in (0, 1))
    walks = [fact.walks for fact in again.journal[0].facts]
    assert set(walks) == {2}  # these random models take nothing in four steps
    assert again.journal[0].importance[LAYERS[-1]].shape == (3, WIDTH)
    assert not torch.equal(total(again), total(once))


def test_small_parts_give_the_order_of_the_whole_batch(lm, facts, monkeypatch):
    """Memory for one fact at a time: one by one gets the batch whole, and hands on all the same."""
    plain, parts = copy.deepcopy(lm), {"targets": replace(SEARCH, one_by_one=True)}
    edited(plain, facts, 3, **parts)
    estimate = type(editor_of(lm).module).estimate
    monkeypatch.setattr(
        "cakeflow.core.locate_then_edit.LocateThenEdit.estimate",
        lambda self, *options: replace(estimate(self, *options), facts=1),
    )
    edited(lm, facts, 3, **parts)
    assert lm.fingerprint() == plain.fingerprint()
