"""Decoys against the solve of facts and decoys together, written out densely, and what they hide."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cakeflow import LeastSquares, NullSpace
from cakeflow.core.contracts import checked_update
from cakeflow.errors import ConfigError, ShapeError
from cakeflow.metrics import exposure
from cakeflow.solvers import Decoys, EqualityConstrained, KeyHistory
from cakeflow.testing import SolverContract, random_problems

PROBLEMS = [replace(each, gap=torch.zeros_like(each.residual)) for each in random_problems()]


class TestDecoys(SolverContract):
    solver = Decoys(LeastSquares(0.1))


def others(names, each, seed):
    """Keys of decoys that depend on what is asked for."""
    generator = torch.Generator().manual_seed(len(names) + 10 * each + 100 * seed)
    return torch.randn(3 * each, 8, generator=generator, dtype=torch.float64)


def dense(problem, residual, keys):
    history = problem.history.keys
    system = problem.covariance.weight * problem.covariance.moment + keys.T @ keys + 0.1 * torch.eye(8).double()
    system = system if history is None else system + history.T @ history
    return residual.T @ keys @ torch.linalg.inv(system)


@pytest.mark.parametrize("form", ["dual", "primal"])
@given(case=st.sampled_from(PROBLEMS), each=st.integers(1, 2), share=st.sampled_from([0.0, 0.3, 2.0]))
def test_facts_and_decoys_are_solved_together(form, case, each, share):
    case = replace(case, decoys=others)
    update = Decoys(LeastSquares(0.1, form), each, share, ("a", "b"), seed=4).solve(case)
    keys, count = torch.cat([case.keys, others(("a", "b"), each, 4)]), len(case.keys)
    torch.testing.assert_close(update.left[:count], case.residual, rtol=0, atol=0)
    lengths = update.left[count:].norm(dim=1)
    expected = torch.full_like(lengths, share * float(case.residual.norm(dim=1).mean()))
    torch.testing.assert_close(lengths, expected)
    torch.testing.assert_close(update.dense, dense(case, update.left, keys), rtol=1e-8, atol=1e-10)
    assert (update.extra, update.is_plain, update.numbers["decoys"]) == (3 * each, False, 3 * each)
    assert checked_update(Decoys(), update, case, layer=0) is update


@given(st.sampled_from(PROBLEMS))
def test_the_change_spans_the_keys_of_decoys_that_move(case):
    """Two facts and three decoys: a change of five rows has room for five keys."""
    part = {name: getattr(case, name)[:2] for name in ("keys", "residual", "prompt_keys", "gap")}
    case = replace(case, **part, history=KeyHistory(), decoys=others)
    for share, expected in ((0.5, True), (0.0, False)):
        change = Decoys(LeastSquares(), residual=share).solve(case).dense
        seen = exposure(change, torch.cat([case.keys, others((), 1, 0)]), case.covariance.moment)
        assert bool((seen[2:] > 1 - 1e-6).all()) == expected


@given(st.sampled_from(PROBLEMS))
def test_facts_that_are_undone_have_no_decoys(case):
    case, inner = replace(case, gap=None), LeastSquares(0.1)
    assert torch.equal(Decoys(inner).solve(case).dense, inner.solve(case).dense)


def test_directions_belong_to_seed_layer_and_batch():
    case = replace(PROBLEMS[0], decoys=lambda *_: others((), 1, 0))
    moved = [
        Decoys(LeastSquares(0.1), seed=seed).solve(replace(case, index=index)).left[3:]
        for seed, index in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    assert torch.equal(moved[0], moved[1])
    assert not torch.allclose(moved[0], moved[2])
    assert not torch.allclose(moved[0], moved[3])


@pytest.mark.parametrize("inner", [NullSpace(LeastSquares(0.5)), EqualityConstrained(LeastSquares(0.5))])
def test_any_solver_may_be_inside(inner):
    case = replace(PROBLEMS[0], decoys=lambda *_: others((), 1, 0))
    update = Decoys(inner, residual=0.5).solve(case)
    wider = replace(case, keys=torch.cat([case.keys, others((), 1, 0)]), residual=update.left)
    wider = replace(wider, prompt_keys=wider.keys, gap=torch.zeros_like(update.left))
    torch.testing.assert_close(update.dense, inner.solve(wider).dense)
    outside = NullSpace(Decoys(LeastSquares(0.5), residual=0.5)).solve(case)
    assert outside.extra == 3


def test_a_problem_that_has_no_decoys_to_give():
    with pytest.raises(ShapeError, match="Decoys needs keys of other subjects"):
        Decoys().solve(PROBLEMS[0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"each": 0}, "Decoys.each must be"),
        ({"residual": -1.0}, "Decoys.residual must be 0 or more, and finite; got -1.0"),
        ({"residual": float("nan")}, "finite; got nan"),
        ({"residual": float("inf")}, "finite; got inf"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(ConfigError, match=message):
        Decoys(**values)
