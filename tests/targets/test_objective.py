"""Every term against full forward passes, gradients against autograd through them, and terms defined here."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cakeflow import Contexts, GradientSearch
from cakeflow.errors import ArchitectureError, ConfigError
from cakeflow.forward.suffix import cut
from cakeflow.forward.tokens import encode_batch
from cakeflow.models.architecture import Site
from cakeflow.models.hooks import frozen
from cakeflow.targets import (
    EssenceKL,
    NormDecay,
    Objective,
    ObjectiveTerm,
    PreparedTerm,
    SearchProblem,
    TargetLikelihood,
    TermRows,
)
from cakeflow.testing import ObjectiveTermContract

from .plain import added, relative, tokenised

CONTEXTS = Contexts.of(["{}", "Because of the high cost of living in. {}", "I am. {}"])
SITES = {"block": ["block"], "both": ["mlp_out", "attn_out"]}
LAYER = 2
TERMS = {"likelihood": TargetLikelihood(0.7, 0.25), "essence": EssenceKL(0.3), "decay": NormDecay(2.0)}


def modules(lm, names):
    return [lm.model.get_submodule(lm.architecture.path(Site(LAYER, name))) for name in names]


def full_nll(lm, request, names, deltas):
    nll = 0.0
    for ids, at, target in tokenised(lm.tokenizer, request, CONTEXTS):
        log_probs = added(lm.model, modules(lm, names), ids, at, deltas)[0][target - 1 : -1]
        nll = nll + torch.nn.functional.nll_loss(log_probs, torch.tensor(ids[target:])) / len(CONTEXTS.templates)
    return nll


def full_kl(lm, request, names, deltas):
    encoded = lm.tokenizer(f"{request.subject} is a")
    last = encoded.char_to_token(len(request.subject) - 1)
    ids, nothing = encoded["input_ids"], [torch.zeros_like(delta) for delta in deltas]
    before, now = (added(lm.model, modules(lm, names), ids, last, part)[0][last] for part in (nothing, deltas))
    return torch.nn.functional.kl_div(before, now, reduction="sum", log_target=True)


def full_decay(lm, request, names, deltas):
    ids, at, _ = next(tokenised(lm.tokenizer, request, CONTEXTS))
    starts = added(lm.model, modules(lm, names), ids, at, [torch.zeros_like(delta) for delta in deltas])[1]
    return sum(delta.norm() / start.square().sum() for delta, start in zip(deltas, starts, strict=True))


FULL = {"likelihood": full_nll, "essence": full_kl, "decay": full_decay}


@pytest.fixture
def chosen(requests):
    return requests[2:5]


@pytest.fixture(params=SITES)
def names(request):
    return SITES[request.param]


def problem_of(lm, requests, names, max_tokens=40):
    sites = [Site(LAYER, name) for name in names]
    return SearchProblem.prepare(lm, encode_batch(lm, requests, CONTEXTS), sites, max_tokens)


def objective_of(problem, terms=TERMS):
    return Objective({name: term.prepare(problem) for name, term in terms.items()})


def random_delta(problem, seed=0):
    return torch.randn(problem.initial.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nobody(problem):
    return torch.zeros(len(problem.batch), dtype=torch.bool)


@pytest.mark.parametrize("term", TERMS)
def test_a_term_equals_full_passes_and_its_gradient_autograd_through_them(tiny, chosen, names, term):
    problem = problem_of(tiny, chosen, names)
    delta = random_delta(problem)
    with frozen(tiny):
        value = objective_of(problem, {term: TERMS[term]}).evaluate(delta, nobody(problem), with_grad=True)
        for index, request in enumerate(chosen):
            deltas = [part.clone().requires_grad_() for part in delta[index]]
            plain = FULL[term](tiny, request, names, deltas)
            grad = torch.stack(torch.autograd.grad(TERMS[term].factor * plain, deltas))
            assert float(value.terms[term][index]) == pytest.approx(float(plain.detach()), rel=1e-9)
            assert float(value.loss[index]) == pytest.approx(TERMS[term].factor * float(plain.detach()), rel=1e-9)
            assert relative(value.grad[index], grad) < 1e-8


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_of_all_terms_against_finite_differences(tiny, chosen, names, seed):
    problem = problem_of(tiny, chosen, names)
    delta, direction = random_delta(problem, seed), random_delta(problem, seed + 10)
    with frozen(tiny):
        objective = objective_of(problem)
        grad = objective.evaluate(delta, nobody(problem), with_grad=True).grad
        ends = [objective.evaluate(delta + h * direction, nobody(problem), with_grad=False) for h in (1e-3, -1e-3)]
    slope = (ends[0].loss - ends[1].loss) / 2e-3
    torch.testing.assert_close((grad * direction).sum((1, 2)), slope, rtol=1e-3, atol=1e-5)  # Llama's norms are float32


def test_the_loss_is_the_weighted_sum_of_the_terms(tiny, chosen, names):
    problem = problem_of(tiny, chosen, names)
    solved = torch.tensor([True, False, True])
    value = objective_of(problem).evaluate(random_delta(problem), solved, with_grad=False)
    weight = 0.7 * torch.where(solved, 0.25, 1.0).double()
    expected = weight * value.terms["likelihood"] + 0.3 * value.terms["essence"] + 2.0 * value.terms["decay"]
    torch.testing.assert_close(value.loss, expected)


def test_the_factor_of_solved_facts_scales_their_gradient(tiny, chosen):
    problem, everybody = problem_of(tiny, chosen, ["block"]), torch.tensor([True, False, True])
    with frozen(tiny):
        objective = objective_of(problem, {"likelihood": TargetLikelihood(solved_factor=0.5)})
        free, eased = (
            objective.evaluate(random_delta(problem), solved, with_grad=True).grad
            for solved in (nobody(problem), everybody)
        )
    torch.testing.assert_close(eased, free * torch.tensor([0.5, 1.0, 0.5])[:, None, None], rtol=1e-12, atol=0)


def test_without_gradients_the_numbers_are_the_same_and_the_gradient_is_zero(tiny, chosen, names):
    problem = problem_of(tiny, chosen, names)
    with frozen(tiny):
        objective, delta = objective_of(problem), random_delta(problem)
        value, bare = (objective.evaluate(delta, nobody(problem), with_grad=on) for on in (True, False))
    assert float(value.grad.norm()) > 0
    assert float(bare.grad.norm()) == 0
    assert torch.equal(value.loss, bare.loss)
    assert all(torch.equal(part, bare.terms[name]) for name, part in value.terms.items())
    assert not any(part.requires_grad for part in (value.delta, value.grad, value.loss, *value.terms.values()))


@pytest.mark.parametrize("max_tokens", [1, 9, 10_000])
def test_facts_that_are_done_are_dropped_and_the_others_keep_their_numbers(tiny, chosen, names, max_tokens):
    problem, active = problem_of(tiny, chosen, names, max_tokens), torch.tensor([True, False, True])
    with frozen(tiny):
        objective, delta = objective_of(problem), random_delta(problem)
        whole = objective.evaluate(delta, nobody(problem), with_grad=True)
        part = objective.only(active).evaluate(delta, nobody(problem), with_grad=True)
    torch.testing.assert_close(part.loss[active], whole.loss[active], rtol=1e-10, atol=0)
    torch.testing.assert_close(part.grad[active], whole.grad[active], rtol=1e-7, atol=1e-12)
    assert torch.equal(part.solved[active], whole.solved[active])
    assert float(part.terms["likelihood"][1]) == float(part.terms["essence"][1]) == 0
    alone = objective.only(active).only(torch.tensor([False, False, True]))
    kept = alone.evaluate(delta, nobody(problem), with_grad=False)
    torch.testing.assert_close(kept.loss[2], whole.loss[2], rtol=1e-10, atol=0)


def test_solved_means_every_token_in_every_context(tiny, chosen):
    """Each row's own most likely tokens as its labels; then one token of one row is another."""
    problem = problem_of(tiny, chosen, ["block"])
    delta, parts = torch.zeros_like(problem.initial), []
    with torch.no_grad():
        for part in problem.prompts:
            parts.append(replace(part, label=problem.logits(part, delta).argmax(1)))
    spoiled = next(i for i, part in enumerate(parts) if (part.fact == 1).any())
    label = parts[spoiled].label.clone()
    label[int((parts[spoiled].fact[parts[spoiled].row] == 1).nonzero()[-1])] += 1
    others = [*parts[:spoiled], replace(parts[spoiled], label=label), *parts[spoiled + 1 :]]
    for prompts, expected in ((parts, [True, True, True]), (others, [True, False, True])):
        value = objective_of(replace(problem, prompts=prompts)).evaluate(delta, nobody(problem), with_grad=False)
        assert value.solved.tolist() == expected


def test_without_a_term_that_counts_misses_nothing_is_solved(tiny, chosen):
    problem = problem_of(tiny, chosen, ["block"])
    objective = objective_of(problem, {"essence": EssenceKL(), "decay": NormDecay()})
    assert not objective.evaluate(random_delta(problem), ~nobody(problem), with_grad=False).solved.any()


def test_nothing_added_costs_nothing(tiny, chosen, names):
    problem = problem_of(tiny, chosen, names)
    nothing, something = (
        objective_of(problem).evaluate(scale * random_delta(problem), nobody(problem), with_grad=False).terms
        for scale in (0, 1)
    )
    assert nothing["decay"].tolist() == [0, 0, 0]
    assert nothing["essence"].abs().max() < 1e-12
    assert (something["essence"] > 0).all()


@given(st.floats(0.01, 100.0), st.integers(0, 5))
def test_decay_is_proportional_to_the_length(scale, seed):
    gen = torch.Generator().manual_seed(seed)
    initial, delta = torch.randn(2, 4, 2, 6, generator=gen, dtype=torch.float64)
    term = NormDecay().prepare(SearchProblem(None, None, [], initial, [], 1))  # needs nothing of the model
    (rows,), (longer,), (flipped,) = term.rows(delta), term.rows(scale * delta), term.rows(-delta)
    torch.testing.assert_close(longer.value, scale * rows.value)
    assert torch.equal(flipped.value, rows.value)
    assert rows.fact.tolist() == [0, 1, 2, 3]


def test_newer_numbers_are_taken_over_for_active_facts_only(tiny, chosen):
    problem, active = problem_of(tiny, chosen, ["block"]), torch.tensor([False, True, False])
    objective = objective_of(problem)
    first, second = (objective.evaluate(random_delta(problem, i), nobody(problem), with_grad=False) for i in (0, 1))
    mixed = first.updated(active, second)
    for index, source in enumerate((first, second, first)):
        assert mixed.loss[index] == source.loss[index]
        assert torch.equal(mixed.delta[index], source.delta[index])
        assert mixed.terms["essence"][index] == source.terms["essence"][index]


@pytest.mark.parametrize("kind", [TargetLikelihood, EssenceKL, NormDecay])
@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_a_factor_must_not_be_negative(kind, value):
    with pytest.raises(ConfigError, match=f"{kind.__name__}: factor must be 0 or more, got {value}"):
        kind(factor=value)


@pytest.mark.parametrize("value", [0.0, -1.0, 1.5, float("nan")])
def test_a_solved_factor_eases(value):
    with pytest.raises(ConfigError, match=rf"solved_factor must lie in \(0, 1\], got {value}"):
        TargetLikelihood(solved_factor=value)


@pytest.mark.parametrize("search", [GradientSearch(steps=2), GradientSearch(steps=2, essence=None)], ids=["kl", "none"])
def test_an_attention_that_cannot_start_in_the_middle_is_refused(lm, chosen, monkeypatch, search):
    def without_prefix(*args, **options):
        parts, outputs = cut(*args, **options)
        zeros = [tuple(None if value is None else 0 * value for value in part.values) for part in parts]
        return [replace(part, values=values) for part, values in zip(parts, zeros, strict=True)], outputs

    monkeypatch.setattr("cakeflow.targets.objective.cut", without_prefix)
    with pytest.raises(ArchitectureError, match=r"resumed from cached attention keys differs .* by \d"):
        search.search(lm, encode_batch(lm, chosen, CONTEXTS), LAYER)


@dataclass(frozen=True)
class Unlikelihood(ObjectiveTerm):
    """The old target must become unlikely: -log(1 - p) of its tokens, in rows of its own; little is not counted."""

    factor: float = 0.2
    floor: float = 1e-3

    def prepare(self, problem):
        facts, rows = [], []
        for fact, (request, variants) in enumerate(zip(problem.batch.requests, problem.batch.rows, strict=True)):
            old = problem.lm.tokenizer(f" {request.target_true}", add_special_tokens=False)["input_ids"]
            for row in variants:
                facts.append(fact)
                rows.append(replace(row, ids=(*row.ids[: row.target], *old)))
        return PreparedUnlikelihood(self, problem, problem.cut(rows, facts))


@dataclass(frozen=True)
class PreparedUnlikelihood(PreparedTerm):
    term: Unlikelihood
    problem: SearchProblem
    parts: list

    def rows(self, delta):
        with torch.no_grad():
            total = torch.zeros(len(delta), dtype=delta.dtype)
            for part in self.parts:
                total.index_add_(0, part.fact, self.each(part, delta))
        counts = self.term.factor * total > self.term.floor
        for part in self.parts:
            yield TermRows(part.fact, self.each(part, delta) * counts[part.fact])

    def each(self, part, delta):
        p = self.problem.logits(part, delta).softmax(-1).gather(1, part.label[:, None])[:, 0]
        count = torch.bincount(part.row, minlength=len(part.fact))
        sums = p.new_zeros(len(part.fact)).index_add(0, part.row, -torch.log1p(-p))
        return sums / count / len(self.problem.batch.rows[0])

    def factor(self, solved):
        return self.term.factor

    def only(self, active):
        return replace(self, parts=[part.only(active) for part in self.parts if active[part.fact].any()])


class TestUnlikelihood(ObjectiveTermContract):
    term = Unlikelihood(0.2, 0.0)


def full_unlikelihood(lm, request, values):
    """Unlikelihood of the old target by full passes."""
    old, total = replace(request, target_new=request.target_true), 0.0
    for ids, at, target in tokenised(lm.tokenizer, old, CONTEXTS):
        log_probs = added(lm.model, modules(lm, ["block"]), ids, at, [values])[0][target - 1 : -1]
        p = log_probs.gather(1, torch.tensor(ids[target:])[:, None]).exp()
        total += float(-torch.log1p(-p).mean()) / len(CONTEXTS.templates)
    return total


def test_a_term_with_rows_of_its_own(tiny, chosen):
    problem = problem_of(tiny, chosen, ["block"])
    delta = random_delta(problem)
    with frozen(tiny):
        counted, nothing = (
            objective_of(problem, {"old": Unlikelihood(0.2, floor)}).evaluate(delta, nobody(problem), with_grad=True)
            for floor in (0.0, 1e9)
        )
        for index, request in enumerate(chosen):
            plain = full_unlikelihood(tiny, request, delta[index, 0])
            assert float(counted.terms["old"][index]) == pytest.approx(plain, rel=1e-9)
    assert float(counted.grad.norm()) > 0
    assert float(nothing.grad.norm()) == float(nothing.loss.norm()) == 0


def test_a_search_with_a_term_of_its_own_forgets_the_old_target(tiny, chosen):
    plain = GradientSearch(steps=8, lr=0.1, clamp=3.0)
    forgetting, batch = replace(plain, further=(Unlikelihood(5e3),)), encode_batch(tiny, chosen, CONTEXTS)
    targets = [search.search(tiny, batch, LAYER) for search in (forgetting, plain)]
    with torch.no_grad():
        for index, request in enumerate(chosen):
            ends = [full_unlikelihood(tiny, request, (each.values - each.initial)[index]) for each in targets]
            assert ends[0] < ends[1]
    alone = forgetting.search(tiny, encode_batch(tiny, chosen[1:2], CONTEXTS), LAYER)
    assert relative(alone.values[0], targets[0].values[1]) < 1e-9


@dataclass(frozen=True)
class Penalty(ObjectiveTerm):
    """Some directions of the vector cost more than others; needs nothing but delta."""

    factor: float = 1.0

    def prepare(self, problem):
        return PreparedPenalty(self.factor, torch.arange(problem.initial.shape[2]).double())


@dataclass(frozen=True)
class PreparedPenalty(PreparedTerm):
    weight: float
    importance: torch.Tensor

    def rows(self, delta):
        yield TermRows(torch.arange(len(delta)), 0.5 * (self.importance * delta[:, 0].square()).sum(1))

    def factor(self, solved):
        return self.weight


def test_a_term_that_needs_delta_only(tiny, chosen):
    problem = problem_of(tiny, chosen, ["block"])
    delta = random_delta(problem)
    value = objective_of(problem, {"penalty": Penalty(3.0)}).evaluate(delta, nobody(problem), with_grad=True)
    torch.testing.assert_close(value.grad, 3.0 * torch.arange(48).double() * delta)


@pytest.mark.parametrize(("steps", "same"), [(2, True), (5, False)])
def test_the_first_step_ignores_a_penalty_that_is_flat_at_zero(tiny, chosen, steps, same):
    batch, search = encode_batch(tiny, chosen, CONTEXTS), GradientSearch(steps=steps, lr=0.1)
    plain, bound = (each.search(tiny, batch, LAYER) for each in (search, replace(search, further=(Penalty(1e3),))))
    assert torch.equal(plain.values, bound.values) is same
    assert (bound.loss > plain.loss).all()
