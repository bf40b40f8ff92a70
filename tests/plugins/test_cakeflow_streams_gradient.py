"""Edits from one gradient against UltraEdit's formulas, with all tokens so far in one matrix."""

from dataclasses import replace

import pytest
import torch
from cakeflow_streams import NormalizedGradient
from cakeflow_streams.gradient import NONE
from hypothesis import given
from hypothesis import strategies as st

from cakeflow import LayerProblem
from cakeflow.errors import ConfigError, NumericalError
from cakeflow.solvers import KeyHistory, Update

WIDTH, OUT, FACTS = 6, 4, 2
SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=5).filter(lambda sizes: sizes[0] > 1)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem(keys, gradients, earlier=(), history=None):
    weight, residual = randn(OUT, WIDTH), randn(FACTS, OUT)
    return LayerProblem(
        randn(FACTS, WIDTH), residual, weight, weight, history=history or KeyHistory(),
        tokens=lambda: (keys, gradients), earlier=earlier, gap=residual,
    )  # fmt: skip


def stream(solver, sizes, seed):
    """Yield keys and gradients of all tokens so far, the number of new ones, and the update."""
    history, earlier, K, G = KeyHistory(), [], randn(0, WIDTH), randn(0, OUT)
    for number, size in enumerate(sizes):
        keys, gradients = (
            2 + 3 * randn(size, WIDTH, seed=seed + number),
            1e-3 * randn(size, OUT, seed=seed + 50 + number),
        )
        K, G = torch.cat([K, keys]), torch.cat([G, gradients])
        update = solver.solve(problem(keys, gradients, tuple(earlier), history))
        yield K, G, size, update
        earlier.append(update)


@given(SIZES, st.sampled_from([1.0, 10.0]), st.sampled_from([1e-6, 0.1]), st.integers(0, 99))
def test_a_stream_by_the_formula_of_ultraedit(sizes, ridge, lr, seed):
    """``solve(K^T K + alpha I, K^T V)``, V by features less their mean over their deviation, over all tokens seen."""
    for K, G, size, update in stream(NormalizedGradient(lr, ridge), sizes, seed):
        normal_K, normal_G = ((each - each.mean(0)) / each.std(0) for each in (K, G))
        V = torch.stack([-lr * float(k @ k) * g for k, g in zip(normal_K[-size:], normal_G[-size:], strict=True)])
        new = K[-size:]
        shift = torch.linalg.solve(new.T @ new + ridge * torch.eye(WIDTH, dtype=torch.float64), new.T @ V)
        torch.testing.assert_close(update.dense, shift.T, rtol=0, atol=1e-9 * float(shift.abs().max()))
        assert update.numbers == {"tokens": size, "seen": len(K)}


def test_it_leads_down_the_gradient():
    """Each token's output moves against its own gradient, where gradients are symmetric about 0."""
    keys, half = randn(6, 12, seed=3), randn(3, OUT, seed=4)
    gradients, weight = torch.cat([half, -half]), randn(OUT, 12)
    task = replace(problem(keys, gradients), keys=randn(FACTS, 12), weight=weight, original_weight=weight)
    moved = keys @ NormalizedGradient(1e-2, 1e-6).solve(task).dense.T
    assert bool(((moved * gradients / gradients.std(0)).sum(1) < 0).all())


@given(SIZES, st.integers(0, 99))
def test_moments_batch_by_batch_are_those_of_all_rows(sizes, seed):
    moments, rows = NONE, 1e3 + randn(sum(sizes), 3, seed=seed)
    for part in rows.split(sizes):
        moments = moments.with_rows(part)
    torch.testing.assert_close(moments.mean, rows.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(moments.squares, (rows - rows.mean(0)).square().sum(0), rtol=1e-9, atol=0)
    assert moments.count == len(rows)


def test_without_caches_the_bits_are_the_same_and_a_batch_that_was_taken_back_does_not_count():
    solver, updates = NormalizedGradient(0.1), []
    for *_, update in stream(solver, [3, 2, 4], 7):
        updates.append(update)
    keys, gradients, history = randn(2, WIDTH, seed=70), randn(2, OUT, seed=71), KeyHistory()
    cached = [solver.solve(problem(keys, gradients, updates[:count], history)) for count in (1, 3, 3, 2)]
    fresh = [solver.solve(problem(keys, gradients, updates[:count])) for count in (1, 3, 3, 2)]
    assert all(torch.equal(a.dense, b.dense) for a, b in zip(cached, fresh, strict=True))
    others = solver.solve(problem(keys, gradients, [updates[0], updates[2]], history))
    assert torch.equal(others.dense, solver.solve(problem(keys, gradients, [updates[0], updates[2]])).dense)
    assert not torch.equal(others.dense, cached[1].dense)


def test_missing_needs_and_bad_settings():
    task = problem(randn(3, WIDTH), randn(3, OUT))
    with pytest.raises(ConfigError, match="needs the gradients at the targets' tokens"):
        NormalizedGradient().solve(replace(task, tokens=None))
    with pytest.raises(ConfigError, match="takes back whole batches only"):
        NormalizedGradient().solve(replace(task, gap=None))
    for other in (Update(randn(OUT, WIDTH)), Update(randn(2, WIDTH), randn(2, OUT))):
        with pytest.raises(ConfigError, match="an earlier batch was edited by another solver"):
            NormalizedGradient().solve(replace(task, earlier=[other]))
    with pytest.raises(NumericalError, match="one token so far, and no deviation of one"):
        NormalizedGradient().solve(problem(randn(1, WIDTH), randn(1, OUT)))
    for bad in ({"lr": 0.0}, {"ridge": -1.0}):
        with pytest.raises(ConfigError, match=r"must be above 0"):
            NormalizedGradient(**bad)
