"""Forgetting against full passes over the old answer, its gradient by the logits, its floor and its rows."""

import math
from dataclasses import replace

import pytest
import torch
from cakeflow_streams import Forgetting
from cakeflow_streams.forgetting import MARGIN, differ, old_rows
from hypothesis import given
from hypothesis import strategies as st

from cakeflow import Contexts, GradientSearch
from cakeflow.errors import ConfigError, RequestError
from cakeflow.forward.fact_tokens import with_end
from cakeflow.forward.tokens import encode_batch
from cakeflow.models.architecture import Site
from cakeflow.models.hooks import frozen, inject
from cakeflow.targets import Objective, SearchProblem, TargetLikelihood
from cakeflow.testing import ObjectiveTermContract

CONTEXTS = Contexts.of(["{}", "Because of the high cost of living in. {}", "I am. {}"])
LAYER = 2


class TestForgetting(ObjectiveTermContract):
    term = Forgetting(0.7, floor=0.0)


class TestForgettingUnderTheFloor(ObjectiveTermContract):
    term = Forgetting(floor=100.0)


@pytest.fixture
def facts(requests):
    olds = ["Rome", "Paul Verlaine", "high"]
    return [replace(request, target_true=old) for request, old in zip(requests[1:4], olds, strict=True)]


def problem_of(lm, requests, contexts=CONTEXTS, max_tokens=40):
    return SearchProblem.prepare(lm, encode_batch(lm, requests, contexts), [Site(LAYER)], max_tokens)


def evaluate(problem, delta, **terms):
    nobody = torch.zeros(len(problem.batch), dtype=torch.bool)
    with frozen(problem.lm), torch.no_grad():
        objective = Objective({name: term.prepare(problem) for name, term in terms.items()})
    with frozen(problem.lm):
        return objective.evaluate(delta, nobody, with_grad=True)


def random_delta(problem, seed=0):
    return torch.randn(problem.initial.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_full_passes(lm, request, delta, gap):
    """Mean over the contexts of the mean over the old answer's tokens, each text tokenised whole and run alone."""
    total = 0.0
    for template in CONTEXTS.templates:
        prompt = template.replace("{}", request.text)
        ids = lm.tokenizer(prompt)["input_ids"]
        at = lm.tokenizer(prompt).char_to_token(template.index("{}") + request.subject_end - 1)
        old = lm.tokenizer(gap + request.target_true)["input_ids"]
        with inject(lm, Site(LAYER), delta[None], torch.tensor([at])):
            log_probs = lm(input_ids=torch.tensor([ids + old]), use_cache=False).logits[0].log_softmax(-1)
        likely = log_probs[len(ids) - 1 : -1].gather(1, torch.tensor(old)[:, None]).exp()
        total = total - (1 - likely + math.exp(-20)).log().mean() / len(CONTEXTS.templates)
    return total


@pytest.mark.parametrize("space", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 1000])
def test_it_equals_full_passes_over_the_old_answer(tiny, facts, space, max_tokens):
    problem = problem_of(tiny, facts, max_tokens=max_tokens)
    delta, factor = random_delta(problem), 0.3
    value = evaluate(problem, delta, old=Forgetting(factor, floor=0.0, space=space))
    with frozen(tiny):
        for index, request in enumerate(facts):
            leaf = delta[index, 0].clone().requires_grad_()
            plain = by_full_passes(tiny, request, leaf, " " if space else "")
            (grad,) = torch.autograd.grad(factor * plain, leaf)
            assert float(value.terms["old"][index]) == pytest.approx(float(plain.detach()), rel=1e-9)
            torch.testing.assert_close(value.grad[index, 0], grad, rtol=1e-7, atol=1e-13)


class Direct:
    """A problem whose logits are the vectors themselves, so that gradients are those by the logits."""

    def __init__(self, problem):
        self.batch = problem.batch

    def logits(self, part, delta):
        return delta[part.fact[part.row], 0]


@pytest.mark.parametrize("sharpness", [1.0, 12.0])
def test_the_gradient_by_the_logits(lm, facts, sharpness):
    """``p_y (1[v = y] - p_v) / (1 - p_y + e^-20)``, for one old token in one context; also for a likely one."""
    request = replace(facts[2], target_true="high")
    problem = problem_of(lm, [request], Contexts())
    prepared = Forgetting(1.0, floor=0.0).prepare(problem)
    assert [len(part.label) for part in prepared.parts] == [1]
    label = int(prepared.parts[0].label)
    logits = torch.randn(600, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits[label] = sharpness
    value = Objective({"old": replace(prepared, problem=Direct(problem))}).evaluate(
        logits[None, None], torch.zeros(1, dtype=torch.bool), with_grad=True
    )
    p = logits.softmax(0)
    onehot = torch.zeros_like(p)
    onehot[label] = 1
    want = p[label] * (onehot - p) / (1 - p[label] + math.exp(-20))
    torch.testing.assert_close(value.grad[0, 0], want, rtol=1e-9, atol=1e-15)
    assert math.exp(-20) == MARGIN


def test_under_the_floor_the_gradient_is_that_of_the_weighted_likelihood(tiny, facts):
    """The floor is one of each fact, its weight counted in: one fact above it, the others below."""
    problem = problem_of(tiny, facts)
    delta, f = random_delta(problem), 0.2
    free = evaluate(problem, delta, old=Forgetting(f, floor=0.0))
    weighted = f * free.terms["old"]
    above = int(weighted.argmax())
    floor = float(weighted.sort().values[-2:].mean())
    new = {"new": TargetLikelihood(1 - f)}
    value = evaluate(problem, delta, **new, old=Forgetting(f, floor=floor))
    alone = evaluate(problem, delta, **new)
    for index in range(len(facts)):
        extra = free.grad[index] if index == above else torch.zeros_like(free.grad[index])
        torch.testing.assert_close(value.grad[index], alone.grad[index] + extra, rtol=1e-9, atol=1e-15)
        assert float(value.terms["old"][index]) == (free.terms["old"][index] if index == above else 0.0)
    torch.testing.assert_close(alone.loss, (1 - f) * alone.terms["new"])


def test_at_the_floor_nothing_is_forgotten(lm, facts):
    problem = problem_of(lm, facts[:1])
    delta = random_delta(problem)
    exact = float(0.2 * evaluate(problem, delta, old=Forgetting(0.2, floor=0.0)).terms["old"])
    assert float(evaluate(problem, delta, old=Forgetting(0.2, floor=exact)).loss) == 0
    assert float(evaluate(problem, delta, old=Forgetting(0.2, floor=math.nextafter(exact, 0.0))).loss) == exact


def test_without_an_old_answer_nothing_is_forgotten(tiny, facts):
    problem = problem_of(tiny, [replace(each, target_true=None) for each in facts])
    value = evaluate(problem, random_delta(problem), new=TargetLikelihood(0.8), old=Forgetting())
    torch.testing.assert_close(value.loss, 0.8 * value.terms["new"])
    mixed = problem_of(tiny, [replace(facts[0], target_true=None), *facts[1:]])
    value = evaluate(mixed, random_delta(mixed), old=Forgetting(floor=0.0))
    assert float(value.terms["old"][0]) == 0
    assert (value.terms["old"][1:] > 0).all()


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        ([1], [2], True),
        ([1], [1], False),
        ([1, 2], [1, 3, 4], False),  # half of the new one
        ([1, 2, 3], [1, 4, 5], True),  # a third of either
        ([1, 2, 3, 4], [4, 5], False),  # half of the old one
        ([1, 1, 2], [1, 3, 4], True),  # a token is shared as often as both have it
        ([1, 1, 2], [1, 1, 4], False),
    ],
)
def test_answers_that_share_half_of_their_tokens_do_not_differ(new, old, expected):
    assert differ(new, old) is expected


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_differ_is_symmetric_and_false_for_permutations(new, old):
    assert differ(new, old) is differ(old, new)
    assert not differ(new, sorted(new))


def test_old_answers_are_joined_like_new_ones(tiny, facts):
    """As if they were the new ones; in a chat, where an answer begins a text, without a space."""
    contexts = Contexts(chats=("ask: {}\n", "ask: {} [end]"))
    swapped = [replace(each, target_new=each.target_true, target_true=None) for each in facts]
    problem = problem_of(tiny, facts, contexts)
    for index, want in enumerate(encode_batch(tiny, swapped, contexts).rows):
        rows = old_rows(problem, index)
        assert [(row.ids, row.target) for row in rows] == [(row.ids, row.target) for row in want]
        tied = [row.ids[row.target :] for row in old_rows(problem, index, space=False)]
        assert set(tied) == {rows[1].ids[rows[1].target :]}
        assert tied[0] != rows[0].ids[rows[0].target :]


def test_the_end_of_the_text_is_no_part_of_an_answer(tiny, facts):
    problem = problem_of(tiny, facts, Contexts(chats=("ask: {}\n", "ask: {} [end]")))
    taught = replace(problem, batch=with_end(tiny, problem.batch))
    assert taught.batch.rows != problem.batch.rows
    assert [old_rows(taught, i) for i in range(len(facts))] == [old_rows(problem, i) for i in range(len(facts))]


def test_a_request_can_say_that_there_is_no_space(lm, facts):
    request = replace(facts[0], space=False)
    problem = problem_of(lm, [request], Contexts())
    assert old_rows(problem, 0) == old_rows(problem, 0, space=False)
    assert old_rows(problem, 0) != old_rows(problem_of(lm, facts[:1], Contexts()), 0)


def test_rows_keep_the_token_at_which_the_fact_is_written(lm, facts):
    problem = problem_of(lm, facts)
    moved = [tuple(replace(row, offset=1) for row in rows) for rows in problem.batch.rows]
    problem.batch.rows = moved
    assert {row.offset for row in old_rows(problem, 0)} == {1}


def test_an_old_answer_that_cannot_be_read_is_refused_by_name(lm, facts):
    long = replace(facts[1], target_true="Paul " * 2000)
    with pytest.raises(RequestError, match=r"entry 1, target_true .* tokens with it, \d+ can be read; give another"):
        evaluate(problem := problem_of(lm, [facts[0], long]), random_delta(problem), old=Forgetting())


@pytest.mark.parametrize(("settings", "words"), [({"factor": -1.0}, "factor"), ({"floor": -1.0}, "floor")])
def test_bad_settings(settings, words):
    with pytest.raises(ConfigError, match=words):
        Forgetting(**settings)


def test_a_search_makes_the_old_answer_less_likely_than_one_without_the_term(lm, facts):
    """The final norm scaled, so that the model believes something: here that every fact goes on with "high"."""
    with torch.no_grad():
        for parameter in lm.model.transformer.ln_f.parameters():
            parameter.mul_(8)
    old = "high"
    requests = [replace(each, target_true=old) for each in facts]
    settings = GradientSearch(steps=12, lr=0.3, likelihood=TargetLikelihood(0.2))
    batch = encode_batch(lm, requests, CONTEXTS)
    plain = settings.search(lm, batch, LAYER)
    forgetting = replace(settings, further=(Forgetting(0.8),)).search(lm, batch, LAYER)
    assert (likely(lm, batch, forgetting, old) < likely(lm, batch, plain, old)).all()


def likely(lm, batch, targets, old):
    """Probability of the old answer's first token after the bare prompts, under the values that a search found."""
    (token,) = lm.tokenizer(f" {old}")["input_ids"][:1]
    out = []
    for rows, delta in zip(batch.rows, targets.values - targets.initial, strict=True):
        ids = torch.tensor([rows[0].ids[: rows[0].target]])
        with torch.no_grad(), inject(lm, Site(LAYER), delta[None], torch.tensor([rows[0].fact])):
            out.append(lm(input_ids=ids, use_cache=False).logits[0, -1].softmax(-1)[token])
    return torch.stack(out)
