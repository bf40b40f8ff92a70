"""Stop rules on numbers made up for them, and the hits that a search counts for them."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cakeflow import Contexts, EditRequest, GradientSearch
from cakeflow.errors import ConfigError
from cakeflow.forward.tokens import encode_batch
from cakeflow.targets import LossBelow, ObjectiveValue, SolvedAndNear, StopRule, TargetLikelihood

from .plain import plain, relative

numbers = st.lists(st.tuples(st.floats(0, 2), st.floats(0, 2), st.booleans()), min_size=1, max_size=6)


def value(rows, *, essence=True):
    loss, kl = (torch.tensor([row[i] for row in rows], dtype=torch.float64) for i in (0, 1))
    solved = torch.tensor([row[2] for row in rows])
    nothing = torch.zeros(len(rows), 1, 4)
    return ObjectiveValue(nothing, nothing, loss, solved, {"essence": kl} if essence else {}, solved.long())


@given(numbers, st.floats(0.01, 1))
def test_the_loss_alone(rows, limit):
    assert LossBelow(limit).met(value(rows)).tolist() == [loss < limit for loss, _, _ in rows]


@given(numbers, st.floats(0.01, 1), st.floats(0.01, 1))
def test_solved_and_near_or_the_inner_rule(rows, kl, loss):
    near = [each < kl for _, each, _ in rows]
    low = [each < loss for each, _, _ in rows]
    solved = [each for _, _, each in rows]
    expected = [b or (s and n) for b, s, n in zip(low, solved, near, strict=True)]
    assert SolvedAndNear(kl, LossBelow(loss)).met(value(rows)).tolist() == expected


def test_without_an_essence_a_solved_fact_is_near():
    rows = [(9.0, 0.0, True), (9.0, 0.0, False), (0.01, 0.0, False)]
    assert SolvedAndNear().met(value(rows, essence=False)).tolist() == [True, False, True]


def test_rules_nest():
    rule = SolvedAndNear(0.1, SolvedAndNear(0.5, LossBelow(0.2)))
    assert rule.met(value([(9.0, 0.3, True), (9.0, 0.6, True), (0.1, 9.0, False)])).tolist() == [True, False, True]


def test_a_loss_that_is_not_a_number_is_never_below():
    assert LossBelow(1.0).met(value([(float("nan"), 0.0, False)])).tolist() == [False]


@pytest.mark.parametrize("kl", [0.0, -1.0, float("nan")])
def test_bad_limit(kl):
    with pytest.raises(ConfigError, match=f"SolvedAndNear.kl must be above 0, got {kl}"):
        SolvedAndNear(kl)


@dataclass(frozen=True)
class Hits(StopRule):
    """Done at the last of some evaluations at which the fact was solved."""

    times: int
    inner: StopRule = LossBelow()

    def met(self, value):
        return self.inner.met(value) | (value.hits >= self.times)


def test_hits_count_the_evaluations_at_which_a_fact_is_solved(tiny):
    """Against the plain search; the first fact's bare prompt is the last of its prompts to be solved."""
    contexts = Contexts.of(["{}", "Because of the high cost of living in. {}", "I am. {}"])
    chosen = [EditRequest("I live in {}", "Lyon", "the"), EditRequest("I live in {}", "Newport News", "is")]
    batch, steps = encode_batch(tiny, chosen, contexts), {}
    for solved_in, times in (("all", 1), ("all", 3), ("sampled", 1)):
        likelihood = TargetLikelihood(solved_in=solved_in)
        settings = GradientSearch(steps=30, lr=0.05, clamp=9.0, likelihood=likelihood, stop=Hits(times))
        targets = settings.search(tiny, batch, 4)
        for i, request in enumerate(chosen):
            z, _, _, count, done = plain(tiny, request, contexts, settings, 4)
            assert relative(targets.values[i], z) < 1e-9
            assert (int(targets.steps[i]), bool(targets.converged[i])) == (count, done) == (count, True)
        steps[solved_in, times] = targets.steps
    assert torch.equal(steps["all", 3], steps["all", 1] + 2)
    assert steps["sampled", 1][0] < steps["all", 1][0]
