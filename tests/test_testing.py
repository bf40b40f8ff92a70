"""The contracts hold for what we ship, and catch those who break them."""

from dataclasses import dataclass

import pytest
import torch
from cakeflow_attribution import Noisy, Saliency, Shuffled
from cakeflow_restrain import Prune, Rect

from cakeflow import (
    Endpoints,
    GradientSearch,
    LeastSquares,
    NullSpace,
    OneHot,
    Scores,
    Sequential,
    ShareAllocator,
    Uniform,
    Update,
)
from cakeflow.allocators import Jacobian
from cakeflow.errors import NumericalError, ShapeError
from cakeflow.metrics import EditScore, Efficacy, Generalization, Specificity
from cakeflow.models import Site
from cakeflow.solvers import EqualityConstrained
from cakeflow.targets import EssenceKL, LossBelow, NormDecay, PreparedTerm, SolvedAndNear, TargetLikelihood
from cakeflow.testing import (
    AllocatorContract,
    MetricContract,
    ObjectiveTermContract,
    SolverContract,
    TargetSearchContract,
    WeighterContract,
    tiny_batch,
    tiny_model,
)

SCORES = {0: 0.1, 1: 0.3, 2: 0.2}


def holds(contract, only="test_", **given):
    case = type("Case", (contract,), given)()
    names = [name for name in dir(case) if name.startswith(only)]
    assert names
    for name in names:
        getattr(case, name)()


@pytest.mark.parametrize("allocator", [Sequential(), Sequential(0.5), Sequential(0.0, "self"), Jacobian(1e-8)], ids=str)
def test_allocators(allocator):
    holds(AllocatorContract, allocator=allocator, tolerance=1e-6)


SOLVERS = [
    LeastSquares(), LeastSquares(0.3, "primal"), NullSpace(), EqualityConstrained(), EqualityConstrained(at="prompt"),
    Rect(), Rect(in_loop=True), Prune(), Prune(NullSpace(), double_add=True), NullSpace(Rect(LeastSquares(1.0))),
]  # fmt: skip


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_solvers(solver):
    holds(SolverContract, solver=solver)


@pytest.mark.parametrize(
    "weighter",
    [Uniform(), OneHot(), OneHot(2), Endpoints(), Scores(SCORES), Shuffled(Scores(SCORES)), Noisy(Scores(SCORES)),
     Scores(attribution=Saliency(), score_source="per_request")],
    ids=str,
)  # fmt: skip
def test_weighters(weighter):
    holds(WeighterContract, weighter=weighter)


SEARCHES = [
    GradientSearch(4), GradientSearch(4, site="mlp_out", extra_site="attn_out"), GradientSearch(4, site="mlp.c_fc"),
    GradientSearch(4, essence=None, decay=None, further=(NormDecay(2.0),)), GradientSearch(4, stop=LossBelow(9.0)),
    GradientSearch(40, 0.5, 5.0, likelihood=TargetLikelihood(solved_factor=0.1), stop=SolvedAndNear(1.0)),
]  # fmt: skip


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_searches(search):
    holds(TargetSearchContract, search=search)


@pytest.mark.parametrize("term", [TargetLikelihood(2.0, 0.25), EssenceKL(3.0), NormDecay()], ids=str)
def test_terms(term):
    holds(ObjectiveTermContract, term=term)


class Mixing(NormDecay):
    """Adds the mean of all facts to each."""

    def prepare(self, problem):
        return Mixed(super().prepare(problem))


@dataclass(frozen=True)
class Mixed(PreparedTerm):
    """Its prepared form."""

    inner: PreparedTerm

    def rows(self, delta):
        for rows in self.inner.rows(delta):
            yield rows._replace(value=rows.value + rows.value.mean())

    def factor(self, solved):
        return self.inner.factor(solved)


@dataclass(frozen=True)
class Careless(GradientSearch):
    """Breaks one promise of the contract."""

    fault: str = ""

    def search(self, lm, batch, layer, **options):
        targets = super().search(lm, batch, layer, **options)
        if self.fault == "nan":
            targets.values[0, 0] = torch.nan
        if self.fault == "leaks":
            targets.values[:] += targets.values.mean(0)
        if self.fault == "edits":
            lm.model.lm_head.weight.data.mul_(1.01)
        if self.fault == "hooks":
            lm.model.lm_head.register_forward_hook(lambda *_: None)
        return targets

    def measure(self, lm, batch, layer, **options):
        return (super().search if self.fault == "searches" else super().measure)(lm, batch, layer, **options)


@pytest.mark.parametrize(
    ("fault", "test"),
    [("nan", "values"), ("leaks", "facts"), ("edits", "it_is"), ("hooks", "it_is"), ("searches", "measuring")],
)
def test_a_search_that_breaks_its_contract_is_caught(fault, test):
    with pytest.raises(AssertionError):
        holds(TargetSearchContract, f"test_{test}", search=Careless(4, fault=fault))
    holds(TargetSearchContract, f"test_{test}", search=Careless(4))


METRICS = [
    kind(form) for kind in (Efficacy, Generalization, Specificity, EditScore) for form in ("probability", "exact")
]


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: f"{type(metric).__name__}-{metric.form}")
def test_metrics(metric):
    holds(MetricContract, metric=metric)


class Forgetful(Efficacy):
    """Counts the last update only."""

    def update(self, expected, rival, correct, record, kind):
        self.total, self.records = (expected > rival).float().sum(), torch.tensor(float(len(expected)))


@pytest.mark.parametrize(
    ("contract", "promise", "part"),
    [
        (ObjectiveTermContract, "test_facts", {"term": Mixing()}),
        (MetricContract, "test_parts", {"metric": Forgetful()}),
    ],
)
def test_a_part_that_breaks_its_contract_is_caught(contract, promise, part):
    with pytest.raises(AssertionError):
        holds(contract, promise, **part)


@dataclass(frozen=True)
class Half(ShareAllocator):
    """Leaves something over."""

    residual_at: str = "last"

    def shares(self, weights):
        return torch.full_like(weights, 0.5)


class Bent(Jacobian):
    """Takes more the more is missing."""

    def allocate(self, residual, context):
        return residual * residual.norm()


@dataclass(frozen=True)
class Squared(Sequential):
    """Takes more than there is."""

    def shares(self, weights):
        return super().shares(weights) * 2


class Growing(LeastSquares):
    """Gives another answer each time."""

    def solve(self, problem):
        problem.residual.add_(1)
        return super().solve(problem)


class Turned(LeastSquares):
    def solve(self, problem):
        return Update(super().solve(problem).dense.T)


class Broken(LeastSquares):
    def solve(self, problem):
        return Update(super().solve(problem).dense * float("nan"))


class Negative(Uniform):
    def weigh(self, lm, batch, layers):
        return -super().weigh(lm, batch, layers)


class Vandal(Uniform):
    def weigh(self, lm, batch, layers):
        lm.weight(Site(0, "mlp_out")).data.add_(1)
        return super().weigh(lm, batch, layers)


@pytest.mark.parametrize(
    ("contract", "only", "given", "error", "words"),
    [
        (
            AllocatorContract,
            "test_shares",
            {"allocator": Half()},
            ShapeError,
            "Half: the last layer must take the whole",
        ),
        (AllocatorContract, "test_it_is_linear", {"allocator": Bent()}, AssertionError, None),
        (
            AllocatorContract,
            "test_shares",
            {"allocator": Squared()},
            ShapeError,
            r"Squared: shares must lie in \(0, 1\]",
        ),
        (SolverContract, "test_it_is_pure", {"solver": Growing()}, AssertionError, None),
        (
            SolverContract,
            "test_updates_fit",
            {"solver": Turned()},
            ShapeError,
            "Turned: layer 0 needs an update of shape",
        ),
        (
            SolverContract,
            "test_updates_fit",
            {"solver": Broken()},
            NumericalError,
            "layer 0: .*Broken: the update has values",
        ),
        (WeighterContract, "test_", {"weighter": Negative()}, ShapeError, "Negative: weights must be finite"),
        (WeighterContract, "test_", {"weighter": Vandal()}, AssertionError, None),
    ],
)
def test_who_breaks_a_contract_is_named(contract, only, given, error, words):
    with pytest.raises(error, match=words):
        holds(contract, only, **given)


def test_the_tiny_model_is_the_same_each_time():
    one, other = tiny_model(), tiny_model()
    assert one.fingerprint() == other.fingerprint()
    assert vars(tiny_batch(one)) == vars(tiny_batch(other))
