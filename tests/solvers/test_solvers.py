"""The solves against a brute-force inverse: both forms, with and without history, and AlphaEdit's official formula."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cakeflow import LayerProblem, LeastSquares, NullSpace, Update
from cakeflow.errors import ConfigError, NumericalError
from cakeflow.solvers import EqualityConstrained
from cakeflow.solvers.covariance import Covariance
from cakeflow.solvers.history import KeyHistory

FORMS = ["dual", "primal", "auto"]
CASES = settings(deadline=None, max_examples=60)
COUNTS = {"n": st.integers(1, 7), "m": st.integers(0, 7), "d_in": st.integers(2, 8), "seed": st.integers(0, 999)}


@dataclass
class Case:
    """Random keys K, earlier keys S, residuals R and a second moment C with a null space of known size."""

    n: int = 3
    m: int = 4
    d_in: int = 6
    seed: int = 0
    null: int = 2
    weight: float = 7.0

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        self.K, self.S, self.R, basis = (
            torch.randn(*shape, dtype=torch.float64, generator=generator)
            for shape in ((self.n, self.d_in), (self.m, self.d_in), (self.n, 3), (self.d_in, self.d_in))
        )
        self.null = min(self.null, self.d_in - 1)
        self.U = torch.linalg.qr(basis).Q
        values = torch.tensor([1e-4] * self.null + [0.5 + i for i in range(self.d_in - self.null)], dtype=torch.float64)
        self.C = (self.U * values) @ self.U.T
        self.covariance = Covariance(self.C, self.weight)

    def problem(self, K=None, R=None, S=None, covariance=True):
        weight, S = torch.zeros(3, self.d_in, dtype=torch.float64), self.S if S is None else S
        seen = S if isinstance(S, KeyHistory) else KeyHistory(S if len(S) else None)
        K, R = self.K if K is None else K, self.R if R is None else R
        return LayerProblem(K, R, weight, weight, self.covariance if covariance else None, seen)

    def system(self, ridge, covariance=True):
        eye = torch.eye(self.d_in, dtype=torch.float64)
        return (self.weight * self.C if covariance else 0) + self.S.T @ self.S + self.K.T @ self.K + ridge * eye


def close(got, want, tolerance=1e-8):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


@pytest.mark.parametrize("form", FORMS)
@CASES
@given(**COUNTS, ridge=st.sampled_from([0.0, 0.3, 10.0]), covariance=st.booleans())
def test_every_form_is_the_brute_force_solution(form, ridge, covariance, **counts):
    case, ridge = Case(**counts), ridge if covariance else ridge + 0.1
    update = LeastSquares(ridge, form).solve(case.problem(covariance=covariance))
    close(update.dense, case.R.T @ case.K @ torch.linalg.inv(case.system(ridge, covariance)))
    assert update.right.shape == case.K.shape
    assert torch.equal(update.left, case.R)


@CASES
@given(**COUNTS)
def test_the_update_is_stationary(**counts):
    """(D K^T - R) K + D (lambda C + S^T S + ridge I) = 0, with keys as rows."""
    case = Case(**counts)
    D = LeastSquares(0.3).solve(case.problem()).dense
    gradient = (case.K @ D.T - case.R).T @ case.K + D @ (case.system(0.3) - case.K.T @ case.K)
    assert float(gradient.abs().max()) < 1e-9 * float((case.R.T @ case.K).abs().max() + 1)


SOLVERS = [LeastSquares(0.3, "dual"), LeastSquares(0.3, "primal"), NullSpace(LeastSquares(0.3), threshold=0.02)]


@pytest.mark.parametrize("solver", SOLVERS, ids=["dual", "primal", "null space"])
@CASES
@given(**COUNTS)
def test_order_of_facts_is_irrelevant_and_residuals_enter_linearly(solver, **counts):
    case = Case(**counts)
    order = torch.randperm(case.n, generator=torch.Generator().manual_seed(case.seed))
    D = solver.solve(case.problem()).dense
    close(solver.solve(case.problem(K=case.K[order], R=case.R[order])).dense, D)
    other = torch.randn_like(case.R)
    both = solver.solve(case.problem(R=2 * case.R - other)).dense
    close(both, 2 * D - solver.solve(case.problem(R=other)).dense, 1e-7)


@pytest.mark.parametrize("solver", SOLVERS, ids=["dual", "primal", "null space"])
@CASES
@given(**COUNTS, sizes=st.lists(st.integers(1, 3), min_size=2, max_size=4))
def test_batch_after_batch_with_history_equals_one_joint_solve(solver, sizes, **counts):
    """What is still missing after each batch, solved with the keys before as history, adds up to the whole."""
    case = Case(**{**counts, "n": sum(sizes), "m": 0})
    joint = solver.solve(case.problem()).dense
    history, total = KeyHistory(), torch.zeros_like(joint)
    for K, R in zip(case.K.split(sizes), case.R.split(sizes), strict=True):
        total = total + solver.solve(case.problem(K=K, R=R - K @ total.T, S=history)).dense
        history.append(K)
    close(total, joint, 1e-7)


@CASES
@given(**COUNTS, null=st.integers(1, 5), ridge=st.sampled_from([0.3, 10.0]))
def test_null_space_equals_the_official_formula(null, ridge, **counts):
    """``solve(P (K_1 K_1^T + S) + L2 I, P K_1 R^T)`` with keys as columns, which is not symmetric."""
    case = Case(**counts, null=null)
    P = case.U[:, : case.null] @ case.U[:, : case.null].T
    columns = case.K.T
    system = P @ (columns @ columns.T + case.S.T @ case.S) + ridge * torch.eye(case.d_in, dtype=torch.float64)
    official = torch.linalg.solve(system, P @ columns @ case.R).T
    for form in FORMS:
        close(NullSpace(LeastSquares(ridge, form)).solve(case.problem()).dense, official)


@CASES
@given(**COUNTS)
def test_null_space_leaves_preserved_keys_alone(**counts):
    case = Case(**counts)
    preserved = case.U[:, case.null :].T
    D = NullSpace(LeastSquares(0.3)).solve(case.problem()).dense
    assert float((preserved @ D.T).abs().max()) <= 1e-10 * float(D.abs().max() + 1)
    assert float(D.abs().max()) > 1e-9
    plain = LeastSquares(0.3).solve(case.problem()).dense
    assert float((preserved @ plain.T).abs().max()) > 1e-6  # which the plain solve does not


@pytest.mark.parametrize("form", FORMS)
def test_small_ridge_reaches_the_targets(form):
    case = Case(n=3, m=0, d_in=8, weight=1e-12)
    D = LeastSquares(1e-10, form).solve(case.problem()).dense
    close(case.K @ D.T, case.R, 1e-5)


def test_solving_twice_gives_the_same_bits_and_changes_nothing():
    case = Case()
    problem = case.problem()
    before = [t.clone() for t in (problem.keys, problem.residual, problem.history.keys, case.covariance.moment)]
    for solver in SOLVERS:
        assert torch.equal(solver.solve(problem).dense, solver.solve(problem).dense)
    after = (problem.keys, problem.residual, problem.history.keys, case.covariance.moment)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_two_ridges_on_one_history_do_not_mix():
    case = Case()
    problem = case.problem()
    for ridge in (0.3, 5.0, 0.3):
        got = LeastSquares(ridge, "dual").solve(problem).dense
        close(got, case.R.T @ case.K @ torch.linalg.inv(case.system(ridge)))


def test_auto_takes_the_smaller_system():
    few, many = Case(n=2, m=2, d_in=6), Case(n=5, m=5, d_in=6)
    for case, form in ((few, "dual"), (many, "primal")):
        auto, chosen = (LeastSquares(0.3, name).solve(case.problem()).dense for name in ("auto", form))
        assert torch.equal(auto, chosen)


# ---- equality constraints ----


@CASES
@given(**COUNTS, ridge=st.sampled_from([0.0, 0.3]))
def test_equality_gives_every_key_its_residual_with_the_smallest_change(ridge, **counts):
    case = Case(**{**counts, "n": min(counts["n"], counts["d_in"])})
    update = EqualityConstrained(LeastSquares(ridge)).solve(case.problem())
    preserved = torch.linalg.inv(case.system(ridge) - case.K.T @ case.K)
    gram = case.K @ preserved @ case.K.T
    assume(float(torch.linalg.cond(gram)) < 1e8)
    close(update.dense, case.R.T @ torch.linalg.inv(gram) @ case.K @ preserved, 1e-6)
    close(update.dense @ case.K.T, case.R.T, 1e-6)


@CASES
@given(d_in=st.integers(2, 8), seed=st.integers(0, 999), weight=st.floats(0.1, 1e4))
def test_one_fact_is_the_rank_one_update_of_rome(d_in, seed, weight):
    case = Case(n=1, m=0, d_in=d_in, seed=seed, weight=weight)
    u = torch.linalg.solve(case.C, case.K[0])
    close(EqualityConstrained().solve(case.problem()).dense, torch.outer(case.R[0], u) / (case.K[0] @ u))


def test_equality_is_the_limit_of_least_squares():
    case = Case(weight=1e-9, m=0)
    close(EqualityConstrained().solve(case.problem()).dense, LeastSquares().solve(case.problem()).dense, 1e-4)


def test_equality_at_the_bare_keys():
    """u from the mean key, exact at the bare one: ROME's code of 2022."""
    case = Case(n=1, m=0)
    bare = case.K + 0.1
    update = EqualityConstrained(at="prompt").solve(replace(case.problem(), prompt_keys=bare))
    u = torch.linalg.solve(case.C, case.K[0])
    close(update.dense, torch.outer(case.R[0], u) / (bare[0] @ u))
    close(update.dense @ bare.T, case.R.T)


def test_equality_inside_the_null_space():
    case = Case(n=2, null=3)
    dense = EqualityConstrained(NullSpace(LeastSquares(0.3), 0.02)).solve(case.problem()).dense
    close(dense @ case.K.T, case.R.T)
    assert float((dense @ case.U[:, case.null :]).abs().max()) < 1e-9


@pytest.mark.parametrize("n", [2, 7])
def test_keys_that_depend_on_each_other_are_refused(n):
    case = Case(n=n)
    keys = case.K.clone()
    keys[1] = 2 * keys[0]
    with pytest.raises(NumericalError, match="not independent"):
        EqualityConstrained().solve(case.problem(K=keys))


@dataclass(frozen=True)
class Dense(LeastSquares):
    """A solver that gives no factors."""

    def solve(self, problem):
        return Update(super().solve(problem).dense)


@pytest.mark.parametrize(
    ("solver", "plain"),
    [
        (LeastSquares(0.3), True),
        (LeastSquares(0.3, "primal"), True),
        (NullSpace(LeastSquares(0.3)), True),
        (EqualityConstrained(), True),
        (Dense(0.3), False),
    ],
    ids=str,
)
def test_a_plain_update_has_the_residual_as_its_factor(solver, plain):
    problem = Case(n=2, null=3).problem()
    update = solver.solve(problem)
    assert update.is_plain is plain
    assert (update.left is problem.residual) is plain
    assert update.to("meta").is_plain is plain


@pytest.mark.parametrize("form", FORMS)
def test_a_singular_covariance_is_refused(form):
    case = Case(n=2, m=0)
    case.covariance = Covariance(case.U[:, 3:] @ case.U[:, 3:].T)
    with pytest.raises(NumericalError, match="ridge"):
        LeastSquares(0.0, form).solve(case.problem())


@pytest.mark.parametrize("form", FORMS)
def test_nan_keys_are_refused(form):
    case = Case()
    with pytest.raises(NumericalError):
        LeastSquares(0.3, form).solve(case.problem(K=case.K * float("nan")))


def test_no_null_space_is_refused():
    with pytest.raises(NumericalError, match="raise the threshold"):
        NullSpace(threshold=1e-9).solve(Case().problem())


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: LeastSquares(-1.0), "ridge must be 0 or more"),
        (lambda: LeastSquares(float("nan")), "ridge"),
        (lambda: NullSpace(threshold=0.0), "threshold must be above 0"),
        (lambda: NullSpace(threshold=float("nan")), "threshold"),
        (lambda: LeastSquares(0.0).solve(Case().problem(covariance=False)), "needs ridge above 0"),
        (lambda: NullSpace(LeastSquares(0.0)).solve(Case().problem()), "needs ridge above 0"),
        (lambda: EqualityConstrained(at="nowhere"), "at must be"),
        (lambda: EqualityConstrained(at="prompt").solve(Case().problem()), "keys of the bare prompts"),
        (lambda: EqualityConstrained(Dense()).solve(Case().problem()), "no plain factors"),
    ],
)
def test_bad_settings(build, words):
    with pytest.raises(ConfigError, match=words):
        build()


def test_an_unknown_form_is_refused():
    with pytest.raises(ConfigError, match="form"):
        LeastSquares(0.3, form="duel")
