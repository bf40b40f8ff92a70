"""Who breaks a contract in the walk is named, and the batch is taken back."""

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import lightning as L
import pytest
import torch
from conftest import fit_tiny
from tiny_runs import editor_of

from cakeflow import (
    Contexts,
    EditDataModule,
    Endpoints,
    GradientSearch,
    LeastSquares,
    LocateThenEdit,
    Sequential,
    Solver,
    Update,
    Weighter,
)
from cakeflow.allocators import Jacobian, LayerContext
from cakeflow.core.callback import EditCallback
from cakeflow.core.contracts import checked_parts, checked_residual, checked_update
from cakeflow.core.walk import Walk
from cakeflow.errors import (
    AllocationWarning,
    ArrivalWarning,
    ConfigError,
    NumericalError,
    ShapeError,
    SharedKeyWarning,
)
from cakeflow.forward.fact_tokens import choose_tokens
from cakeflow.forward.keys import FactReader
from cakeflow.forward.tokens import encode_batch
from cakeflow.models.architecture import Site
from cakeflow.targets import TargetSearch
from cakeflow.testing import random_problems

LAYERS = [1, 2, 4]

SEARCH = Walk.search


class Narrow(Sequential):
    def shares(self, weights):
        return super().shares(weights).repeat(2)


class Greedy(Sequential):
    def shares(self, weights):
        return super().shares(weights) * 1.5


class Leaving(Sequential):
    def shares(self, weights):
        return super().shares(weights) * 0.9


class Lost(Sequential):
    def shares(self, weights):
        return super().shares(weights) * float("nan")


@dataclass(frozen=True)
class Wrong(LeastSquares):
    """Right on the first layer, wrong on the second."""

    spoil: str = "shape"
    calls: ClassVar[list[int]] = []

    def solve(self, problem):
        update = super().solve(problem)
        self.calls.append(1)
        if len(self.calls) == 1:
            return update
        return Update(update.right[:, 1:] if self.spoil == "shape" else update.right * float("inf"), update.left)


@pytest.mark.parametrize(
    ("part", "error", "words"),
    [
        ({"allocator": Narrow()}, ShapeError, r"test_contracts.Narrow: \(3,\) weights gave \(6,\) shares"),
        ({"allocator": Greedy()}, ShapeError, r"test_contracts.Greedy: shares must lie in \(0, 1\]"),
        (
            {"allocator": Leaving()},
            ShapeError,
            "test_contracts.Leaving: the last layer must take the whole remaining residual",
        ),
        (
            {"allocator": Lost()},
            NumericalError,
            "layer 1, request 0 .*test_contracts.Lost: the share is not finite",
        ),
        ({"solver": Wrong()}, ShapeError, "test_contracts.Wrong: layer 2 needs an update of shape"),
        ({"solver": Wrong(spoil="values")}, NumericalError, "layer 2, request 0 .*test_contracts.Wrong: .* not finite"),
    ],
)
def test_the_class_is_named_and_nothing_stays(lm, requests, quiet, part, error, words):
    Wrong.calls.clear()
    before = lm.fingerprint()
    with pytest.raises(error, match=words):
        fit_tiny(lm, LAYERS, requests[:2], quiet, 1.0, targets=GradientSearch(steps=2, lr=0.3), **part)
    assert lm.fingerprint() == before


class Bad(Weighter):
    def __init__(self, weights):
        self.weights = weights

    def weigh(self, lm, batch, layers):
        return torch.tensor(self.weights)


@pytest.mark.parametrize(
    "weights",
    [
        [1.0, 1.0],
        [[1.0, 1.0, 1.0]],
        [1.0, float("nan"), 1.0],
        [1.0, -1.0, 1.0],
        [0.0, 0.0, 0.0],
        [1.0, float("inf"), 1.0],
        [[1.0, 1.0, 1.0]] * 5 + [[0.0, 0.0, 0.0]],
    ],
)
def test_a_weighter_that_breaks_its_contract_is_refused(lm, requests, quiet, weights):
    before = lm.fingerprint()
    with pytest.raises(ShapeError, match=r"test_contracts.Bad: .*weights"):
        fit_tiny(lm, LAYERS, requests[:6], quiet, 1.0, targets=GradientSearch(steps=2, lr=0.3), weighter=Bad(weights))
    assert lm.fingerprint() == before


def test_a_fact_without_weight_takes_nothing():
    weights = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    context, missing = LayerContext(Site(1, "mlp_out"), Site(2), 1, weights), torch.ones(3, 4, dtype=torch.float64)
    given = Sequential().allocate(missing, context)
    assert checked_residual(Sequential(), given, missing, context)[:, 0].tolist() == [1.0, 0.0, 1.0]


FAST = GradientSearch(steps=2, lr=0.3)


@dataclass(frozen=True)
class Unsolvable(Solver):
    """Fails on the second layer of the second batch, the way it is told to."""

    how: str
    calls: ClassVar[list[int]] = []

    def solve(self, problem):
        self.calls.append(1)
        update = LeastSquares().solve(problem)
        if len(self.calls) < 5:
            return update
        if self.how == "algebra":
            torch.linalg.cholesky(-torch.eye(2))
        if self.how == "own":
            raise NumericalError("no solution; try another one")
        if self.how == "dense":
            return Update(1e9 * update.dense)
        left = update.left.clone()
        left[1] *= 1e9
        return replace(update, left=left)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("algebra", r"layer 2, request 2 \(.*\), request 3 \(.*\): .*not positive-definite"),
        ("own", r"layer 2, request 2 \(.*\), request 3 \(.*\): no solution; try another one"),
        ("dense", r"layer 2, request 2 .* times the weight's, .* max_relative_update is 10; edit fewer"),
        (
            "one fact",
            r"layer 2, request 2 .*max_relative_update is 10 \(most of it by request 3 \(.*\), a part of norm",
        ),
    ],
)
def test_a_failed_solve_names_layer_and_requests_and_only_its_batch_is_taken_back(tiny, requests, quiet, how, words):
    Unsolvable.calls.clear()
    kept = fit_tiny(tiny, LAYERS, requests[:2], quiet, 1.0, targets=FAST)
    after_first = tiny.fingerprint()
    kept.journal.rollback()
    moment = torch.eye(tiny.oriented(Site(0, "mlp_out")).shape[1], dtype=torch.float64)
    module = LocateThenEdit(
        tiny, LAYERS, solver=Unsolvable(how), targets=FAST, contexts=Contexts(), moments=dict.fromkeys(LAYERS, moment)
    )
    with pytest.raises(NumericalError, match=words) as caught:
        L.Trainer(**quiet).fit(module, datamodule=EditDataModule(requests[:4], 2))
    assert requests[3].text in str(caught.value)
    assert tiny.fingerprint() == after_first
    assert [len(module.journal), len(module.journal.history(tiny.weight_name(Site(1, "mlp_out"))))] == [1, 2]


@pytest.mark.parametrize(("part", "words"), [(0, "keys are"), (1, "keys are"), (2, "residuals at the value site are")])
def test_numbers_read_from_the_model_name_their_fact(lm, requests, quiet, monkeypatch, part, words):
    """A hidden state may overflow for one prompt only."""
    read = FactReader.read

    def spoiled(self, site, value_site):
        result = read(self, site, value_site)
        if site.layer == 2:
            result[part][1, 3] = torch.inf
        return result

    monkeypatch.setattr(FactReader, "read", spoiled)
    before = lm.fingerprint()
    with pytest.raises(NumericalError) as caught:
        fit_tiny(lm, LAYERS, requests[:3], quiet, 1.0, targets=FAST)
    assert f"request 1 ({requests[1].text!r}): {words} not finite (" in str(caught.value)
    assert str(caught.value).startswith(f"layer {4 if part == 2 else 2}, request 1")
    assert lm.fingerprint() == before


def test_target_values_that_are_not_finite_name_their_fact(lm, requests, quiet):
    class Spoiled(GradientSearch):
        def search(self, *args, **options):
            result = super().search(*args, **options)
            result.values[2, 0] = torch.nan
            return result

    before = lm.fingerprint()
    with pytest.raises(NumericalError, match=r"layer 4, request 2 \(.*target values are not finite \(nan\)"):
        fit_tiny(lm, LAYERS, requests[:4], quiet, 1.0, targets=Spoiled(steps=2, lr=0.3))
    assert lm.fingerprint() == before


def test_the_limit_of_an_update_is_the_users(lm, requests, quiet):
    before = lm.fingerprint()
    with pytest.raises(NumericalError, match=r"layer 1, .* max_relative_update is 1e-06"):
        fit_tiny(lm, LAYERS, requests[:2], quiet, 1.0, targets=FAST, max_relative_update=1e-6)
    assert lm.fingerprint() == before
    module = fit_tiny(lm, LAYERS, requests[:2], quiet, 1.0, targets=FAST, max_relative_update=float("inf"))
    assert len(module.journal) == 1


@pytest.mark.parametrize("limit", [0, -1.0, float("nan")])
def test_a_limit_that_is_none(lm, limit):
    with pytest.raises(ConfigError, match="max_relative_update must be above 0"):
        LocateThenEdit(lm, LAYERS, max_relative_update=limit)


@pytest.mark.parametrize("outcome", ["warn", "error"])
def test_a_change_that_does_not_arrive_is_no_silent_success(tiny, requests, quiet, outcome):
    """Second moments so large that they leave next to nothing of the edit."""
    before = tiny.fingerprint()
    words = r"request 0 \(.*\), request 1 \(.*\): 0% of the searched change arrived, and min_arrival is 50%.*ridge"
    caught = (
        pytest.warns(ArrivalWarning, match=words) if outcome == "warn" else pytest.raises(NumericalError, match=words)
    )
    with caught:
        module = fit_tiny(tiny, LAYERS, requests[:2], quiet, 1e9, targets=FAST, on_low_arrival=outcome)
    if outcome == "warn":
        assert module.journal[0].numbers["target/arrived"] == pytest.approx(0.0, abs=1e-3)
        module.journal.rollback()
    assert tiny.fingerprint() == before


class Residuals(EditCallback):
    """Keeps the residual before each layer."""

    def __init__(self):
        self.before = {}

    def on_layer_solved(self, module, edit):
        self.before[edit.context.value_site.layer] = edit.residual


def test_the_part_that_arrived_is_that_of_the_worst_value_site(tiny, requests, quiet):
    """By hand, from the values at both value sites after the edit."""
    residuals = Residuals()
    parts = {"weighter": Endpoints(), "allocator": Sequential(0.0, "self"), "targets": FAST, "min_arrival": 0.0}
    module = fit_tiny(tiny, LAYERS, requests[:3], {**quiet, "callbacks": [residuals]}, 1e-2, **parts)
    (step,), reader = module.journal, FactReader(tiny, encode_batch(tiny, requests[:3], Contexts()))
    arrived = []
    for layer in (1, 4):
        _, _, now = reader.read(Site(layer, "mlp_out"), Site(layer))
        arrived.append(1 - (step.values[layer] - now).norm(dim=1) / residuals.before[layer].norm(dim=1))
    assert step.numbers["target/arrived"] == pytest.approx(float(torch.stack(arrived).amin(0).mean()), rel=1e-4)


def test_facts_whose_keys_coincide_are_announced(lm, requests, quiet):
    twins = [replace(requests[2], prompt="{} is", target_new=new) for new in ("Rome", "Oslo")]
    twins[1] = replace(twins[1], prompt="{} lives in")
    with pytest.warns(SharedKeyWarning, match=r"request 0 \(.*\), request 1 \(.*\): their keys coincide"):
        fit_tiny(lm, LAYERS, twins, quiet, 1e-6, targets=FAST)


def test_facts_whose_keys_coincide_are_searched_together_wherever_they_stand(lm, requests):
    twins = [replace(requests[2], prompt=prompt) for prompt in ("{} is", "{} lives in", "{} plays")]
    batch = encode_batch(lm, [twins[0], *requests[3:6], twins[1]], Contexts())
    with pytest.warns(SharedKeyWarning):
        assert checked_parts(batch, 2, strict=True) == [[0, 4], [1, 2], [3]]
    batch = encode_batch(lm, [*requests[3:5], *twins], Contexts())
    with pytest.raises(
        ConfigError, match=r"request 2 \(.*\), request 3 \(.*\).* 2 facts in one search; raise memory_b"
    ):
        checked_parts(batch, 2, strict=True)
    with pytest.warns(SharedKeyWarning):
        assert checked_parts(batch, 2, strict=False) == [[0, 1], [2, 3, 4]]


def test_the_order_of_the_search_is_not_that_of_the_facts(lm, requests, quiet, monkeypatch):
    """The same targets, whether all are searched at once or in parts that follow the shared keys."""
    twins = [replace(requests[2], prompt=prompt) for prompt in ("{} is", "{} lives in")]
    values = []
    for size in (6, 2):
        monkeypatch.setattr(Walk, "search", _in_parts_of(size))
        editor = editor_of(copy.deepcopy(lm), quiet)
        with pytest.warns(SharedKeyWarning):
            editor.fit([twins[0], *requests[3:6], twins[1]], evaluate=False)
        values.append(editor.module.journal[0].values)
    assert values[0].keys() == values[1].keys()
    for layer, whole in values[0].items():
        assert (whole - values[1][layer]).norm() < 1e-9 * whole.norm()


def _in_parts_of(size):
    def search(walk, value_site, facts):
        walk.footprint = replace(walk.footprint, facts=size)
        return SEARCH(walk, value_site, facts)

    return search


def test_facts_whose_exact_allocation_is_not_solved_are_named(lm, requests, quiet):
    editor = editor_of(lm, quiet, allocator=Jacobian(tolerance=1e-9, iterations=1))
    with pytest.warns(AllocationWarning, match=r"layer 1, request 0 .*, request 1 .* after 1 steps"):
        run = editor.fit(requests[:2], evaluate=False)
    assert run.logged["layer1/steps"] == 1
    assert editor.module.journal[0].changes[0].numbers["steps"] == 1


def test_the_keys_of_one_fact_are_searched_together_and_without_a_word(lm, requests):
    chats = Contexts(chats=("<user> {}\n",))
    facts = choose_tokens(lm, encode_batch(lm, requests[:5], chats), "auto", 1, keys=chats.keys)
    parts = [checked_parts(facts.texts, size, strict=True) for size in (3, 5)]
    assert parts == [[[i, i + 1] for i in range(0, 10, 2)], [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]]
    with pytest.raises(ConfigError, match=r"one fact in and outside a chat, .* 1 facts in one search"):
        checked_parts(facts.texts, 1, strict=True)


@dataclass(frozen=True)
class Astray(TargetSearch):
    """Searches that lead away from the facts with some targets."""

    inner: GradientSearch = FAST
    targets: tuple[str, ...] = ()

    def search(self, lm, batch, layer, **options):
        away = torch.tensor([request.target_new in self.targets for request in batch.requests])
        return replace(self.inner.search(lm, batch, layer, **options), away=away)

    def measure(self, lm, batch, layer, **options):
        return self.inner.measure(lm, batch, layer, **options)


@pytest.mark.parametrize("tile", [1, None])
def test_searches_that_lead_away_are_a_fault_where_all_of_the_batch_do_however_it_is_split(lm, requests, tile):
    names, before = [request.target_new for request in requests[:3]], lm.fingerprint()
    editor_of(copy.deepcopy(lm), targets=Astray(targets=(names[2],)), tile=tile).fit(requests[:3], evaluate=False)
    editor = editor_of(lm, targets=Astray(targets=tuple(names)), tile=tile)
    with pytest.raises(NumericalError, match="no search for a target value at layer 3 lowered its target's NLL; lower"):
        editor.fit(requests[:3], evaluate=False)
    assert lm.fingerprint() == before
    assert len(editor.journal) == 0


def test_rows_of_an_update_with_gradients_are_tokens():
    problem, solver = next(random_problems()), LeastSquares(1.0)  # three facts, 8 in, 5 out
    right, left = torch.ones(7, 8, dtype=torch.float64), torch.ones(7, 5, dtype=torch.float64)
    update = Update(right, left, gradients=left)
    assert checked_update(solver, update, problem, 0) is update
    with pytest.raises(
        ShapeError, match=r"needs an update of shape \(\(3, 8\), \(3, 5\)\), got \(\(7, 8\), \(7, 5\)\)"
    ):
        checked_update(solver, Update(right, left), problem, 0)
    with pytest.raises(
        ShapeError, match=r"needs an update of shape \(\(7, 8\), \(7, 5\)\), got \(\(7, 8\), \(2, 5\)\)"
    ):
        checked_update(solver, replace(update, left=left[:2]), problem, 0)
