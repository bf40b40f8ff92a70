"""Earlier keys: rows, their derived forms and a Gram factor that grows instead of being computed again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cakeflow.errors import NumericalError, ShapeError
from cakeflow.solvers.covariance import Covariance
from cakeflow.solvers.history import RECENT, GramFactor, KeyHistory
from cakeflow.solvers.least_squares import LeastSquares
from cakeflow.solvers.null_space import NullSpace
from cakeflow.solvers.problem import LayerProblem


def rows(count, width=6, seed=0):
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spd(width, seed):
    root = rows(width, width, seed)
    return root @ root.T / width + 0.1 * torch.eye(width, dtype=torch.float64)


def gram(keys, m):
    return torch.eye(len(keys), dtype=torch.float64) + keys @ m @ keys.T


@settings(max_examples=80)
@given(
    old=st.lists(st.integers(1, 4), max_size=4),
    new=st.integers(1, 4),
    width=st.integers(2, 9),
    seed=st.integers(0, 99),
    look=st.booleans(),
)
def test_last_rows_are_those_of_the_whole_solve(old, new, width, seed, look):
    """However the old keys came in, and whether or not each batch was solved before it joined."""
    keys, m = rows(sum(old) + new, width, seed), spd(width, seed + 1)
    root = torch.linalg.cholesky(m)
    factor = GramFactor(lambda k: k @ root)
    for part in keys[: sum(old)].split(old) if old else ():
        if look:
            factor.last_rows(part)
        factor.grow(part)
    got = factor.last_rows(keys[sum(old) :])
    whole = torch.linalg.solve(gram(keys, m), keys @ m)
    torch.testing.assert_close(got @ root.T, whole[sum(old) :], rtol=0, atol=1e-9)
    assert len(factor) == sum(old)  # looking does not grow


def test_equal_keys_after_growing_are_solved_anew():
    """The same keys mean something else once they are part of the history."""
    factor, keys, m = GramFactor(lambda k: k), rows(2), torch.eye(6, dtype=torch.float64)
    first = factor.last_rows(keys)
    factor.grow(keys)
    twice = torch.cat([keys, keys])
    again = torch.linalg.solve(gram(twice, m), twice)[2:]
    torch.testing.assert_close(factor.last_rows(keys), again, rtol=0, atol=1e-12)
    assert not torch.allclose(first, again)


def test_keys_changed_in_place_are_not_mistaken_for_the_last_ones():
    factor, keys = GramFactor(lambda k: k), rows(2)
    factor.last_rows(keys)
    keys *= 3
    torch.testing.assert_close(factor.last_rows(keys), GramFactor(lambda k: k).last_rows(keys.clone()))


def test_a_factor_that_is_not_positive_definite_says_what_to_do():
    with pytest.raises(NumericalError, match="ridge"):
        GramFactor(lambda keys: 1e9 * keys).grow(rows(1).expand(3, -1))  # rounding loses the identity
    with pytest.raises(NumericalError):
        GramFactor(lambda keys: keys * float("nan")).last_rows(rows(2))


def test_an_empty_history():
    empty = KeyHistory()
    assert len(empty) == 0
    assert empty.keys is None
    assert empty.outer() == 0.0
    assert len(empty.factor("x", lambda keys: keys)) == 0
    child, mapped = empty.derive("x", lambda keys: 2 * keys, rows(1))
    assert len(child) == 0
    assert torch.equal(mapped, 2 * rows(1))


def test_only_new_rows_are_transformed():
    history, seen = KeyHistory(rows(2)), []

    def double(keys):
        seen.append(len(keys))
        return 2 * keys

    batch = rows(3, seed=1)
    assert torch.equal(history.derive("d", double, batch)[1], 2 * batch)
    history.append(batch)
    child, mapped = history.derive("d", double, rows(4, seed=2))
    assert torch.equal(child.keys, 2 * torch.cat([rows(2), batch]))
    assert torch.equal(mapped, 2 * rows(4, seed=2))
    assert seen == [2, 3, 4]  # the batch was not transformed again when it joined


def test_a_batch_that_was_looked_at_but_not_committed_leaves_no_trace():
    history, other, batch = KeyHistory(rows(2)), rows(3, seed=1), rows(2, seed=2)
    history.derive("d", lambda k: 2 * k, other)
    history.factor("g", lambda k: k).last_rows(other)
    history.append(batch)
    assert torch.equal(history.derive("d", lambda k: 2 * k, other)[0].keys, 2 * torch.cat([rows(2), batch]))
    fresh = KeyHistory(torch.cat([rows(2), batch]))
    for name in ("g", "h"):
        got = history.factor(name, lambda k: k).last_rows(other)
        torch.testing.assert_close(got, fresh.factor("g", lambda k: k).last_rows(other), rtol=0, atol=1e-12)


def test_derived_quantities_of_different_names_are_kept_apart():
    history = KeyHistory(rows(2))
    assert torch.equal(history.derive(("p", 1), lambda k: k * 2, rows(1))[0].keys, 2 * rows(2))
    assert torch.equal(history.derive(("p", 2), lambda k: k * 3, rows(1))[0].keys, 3 * rows(2))
    one = history.factor("a", lambda k: k).last_rows(rows(1, seed=5))
    four = history.factor("b", lambda k: 4 * k).last_rows(rows(1, seed=5))
    assert not torch.allclose(one, four)


@settings(max_examples=40)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_rows_and_outer_follow_what_is_appended(sizes):
    history, everything, earlier = KeyHistory(), rows(sum(sizes)), []
    for part in everything.split(sizes):
        history.append(part)
        earlier.append((history.keys, history.keys.clone()))
        keys = history.keys
        torch.testing.assert_close(history.outer(), keys.T @ keys, rtol=0, atol=1e-12)
    assert torch.equal(history.keys, everything)
    assert all(torch.equal(seen, copy) for seen, copy in earlier)  # what was handed out does not change


def test_a_derived_history_has_factors_that_grow_too():
    history, new = KeyHistory(rows(2)), rows(1, seed=7)
    for seed in (1, 2):
        derived, mapped = history.derive("half", lambda keys: keys / 2, new)
        got = derived.factor("gram", lambda keys: keys).last_rows(mapped)
        everything = torch.cat([history.keys, new]) / 2
        expected = torch.linalg.solve(gram(everything, torch.eye(6, dtype=torch.float64)), everything)[-1:]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        history.append(rows(2, seed=seed))


def stream(solver_of, count=8, width=6):
    """The history after some batches, each by a solver of its own, whose two forms agree."""
    history, covariance = KeyHistory(), Covariance(spd(width, 3))
    weight = torch.zeros(2, width, dtype=torch.float64)
    for batch in range(count):
        keys, residual = rows(2, width, batch), rows(2, 2, batch)
        problem = LayerProblem(keys, residual, weight, weight, covariance, history)
        updates = [solver_of(batch, form).solve(problem).dense for form in ("dual", "primal")]
        torch.testing.assert_close(*updates, rtol=0, atol=1e-10)
        history.append(keys)
    return history


def test_a_ridge_that_grows_does_not_leave_a_factor_per_batch():
    assert len(stream(lambda batch, form: LeastSquares(1.0 + batch, form))._factors) <= RECENT == 2
    assert len(stream(lambda batch, form: LeastSquares(1.0, form))._factors) == 1


def test_a_threshold_that_grows_does_not_leave_a_history_per_batch():
    history = stream(lambda batch, form: NullSpace(LeastSquares(1.0, form), 0.5 + batch / 20))
    assert len(history._derived) == RECENT


def test_solvers_that_take_turns_keep_their_factors():
    """What is used in every batch is grown, not made anew."""
    history, transformed = KeyHistory(), []

    def double(keys):
        transformed.append(len(keys))
        return 2 * keys

    for batch in range(4):
        for name in ("a", "b")[:: 1 if batch % 2 else -1]:
            history.factor(name, double).last_rows(rows(1, seed=batch))
        history.append(rows(1, seed=batch))
    assert transformed == [1] * 8


def history_of(sizes, width=5, seed=0):
    """A history of batches of these sizes, whose facts are named by their row."""
    keys, history = rows(sum(sizes), width, seed), KeyHistory()
    for part in torch.arange(sum(sizes)).split(sizes) if sizes else ():
        history.append(keys[part], [str(int(row)) for row in part])
    return history, keys


sizes_of_batches = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@settings(max_examples=60)
@given(sizes=sizes_of_batches, seed=st.integers(0, 99), zero=st.integers(0, 3), early=st.booleans())
def test_weights_scale_every_form_of_the_history(sizes, seed, zero, early):
    """Outer products, derived keys and Gram factors are those of ``sqrt(w) k``, whatever was cached before."""
    history, keys = history_of(sizes, seed=seed)
    weights = torch.rand(len(keys), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3
    weights[zero % len(keys)] = 0
    m, new = spd(5, seed + 1), rows(2, 5, seed + 2)
    root = torch.linalg.cholesky(m)
    if early:
        history.derive("m", lambda k: k @ m, new)
    view, scaled = history.weighted(weights), weights.sqrt()[:, None] * keys
    torch.testing.assert_close(view.outer(), keys.T @ torch.diag(weights) @ keys, rtol=0, atol=1e-12)
    child, mapped = view.derive("m", lambda k: k @ m, new)
    torch.testing.assert_close(child.keys, scaled @ m, rtol=0, atol=1e-12)
    torch.testing.assert_close(mapped, new @ m, rtol=0, atol=1e-12)
    both = torch.cat([scaled, new])
    solution = torch.linalg.solve(gram(both, m), both @ m)[len(keys) :]
    got = view.factor("m", lambda k: k @ root).last_rows(new) @ root.T
    torch.testing.assert_close(got, solution, rtol=0, atol=1e-9)
    assert (view.facts, view.batches) == (history.facts, history.batches)
    assert torch.equal(history.keys, keys)  # a view leaves its source alone


@settings(max_examples=60)
@given(sizes=sizes_of_batches, seed=st.integers(0, 99))
def test_one_weight_per_batch_stands_for_each_of_its_keys(sizes, seed):
    history, _ = history_of(sizes, seed=seed)
    weights = torch.arange(len(sizes), dtype=torch.float64)
    each = weights.repeat_interleave(torch.tensor(sizes))
    assert torch.equal(history.weighted(weights).keys, history.weighted(each).keys)


@settings(max_examples=60)
@given(sizes=sizes_of_batches, dropped=st.sets(st.integers(0, 15)))
def test_without_facts_is_a_history_that_never_had_them(sizes, dropped):
    history, keys = history_of(sizes)
    kept = [row for row in range(len(keys)) if row not in dropped]
    view = history.without({str(row) for row in dropped})
    assert view.facts == [str(row) for row in kept]
    assert len(view) == len(kept)
    outer = view.outer() + torch.zeros(5, 5, dtype=torch.float64)
    torch.testing.assert_close(outer, keys[kept].T @ keys[kept], rtol=0, atol=1e-12)
    assert sum(part.stop - part.start for part in view.batches) == len(kept)


def test_keys_added_to_a_weighted_history_count_once():
    history, _ = history_of([2, 1])
    view, new = history.weighted(torch.tensor([2.0, 0.5], dtype=torch.float64)), rows(1, 5, seed=9)
    view.append(new)
    child, _ = view.derive("double", lambda k: 2 * k, new)
    torch.testing.assert_close(child.keys[-1:], 2 * new, rtol=0, atol=0)
    assert len(child) == 4
    assert len(history) == 3


def test_weights_that_cannot_be_meant_are_refused():
    history, _ = history_of([2, 2])
    with pytest.raises(ShapeError, match="3 weights for 4 keys in 2 batches"):
        history.weighted(torch.ones(3))
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(NumericalError, match="finite and 0 or more"):
            history.weighted(torch.tensor([1.0, bad]))
    with pytest.raises(ShapeError, match="2 keys of 1 facts"):
        KeyHistory().append(rows(2), ["one"])
    assert len(KeyHistory().weighted(torch.ones(0))) == len(KeyHistory().without({"a"})) == 0


class Total:
    """Counts what it takes in."""

    def __init__(self):
        self.batches = []

    def __len__(self):
        return sum(self.batches)

    def grow(self, keys):
        self.batches.append(len(keys))


def test_what_is_grown_takes_in_every_batch_once():
    history = KeyHistory()
    for count in (2, 1, 3):
        history.append(rows(count))
        assert history.grown("total", Total).batches[-1] == count
    assert history.grown("total", Total).batches == history.grown("another", Total).batches == [2, 1, 3]
    assert history.grown("total", Total) is history.grown("total", Total)


def test_what_is_cached_is_made_once():
    history, made = KeyHistory(), []
    for _ in range(2):
        assert history.cached("one", lambda: made.append(1) or "thing") == "thing"
        history.append(rows(1))
    assert made == [1]
