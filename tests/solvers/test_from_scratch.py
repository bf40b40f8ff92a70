"""A stream of solves from the unedited weight equals one batch, whatever a filter did on the way."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weight_streams import Stream

from cakeflow.errors import ConfigError
from cakeflow.solvers import FromScratch, KeyHistory, LeastSquares, NullSpace, Solver, Update

SOLVERS = {"ridge": LeastSquares(0.3), "null space": NullSpace(LeastSquares(0.3)), "dual": LeastSquares(0.3, "dual")}


def every_second(matrix):
    return matrix * (torch.arange(matrix.numel()).reshape(matrix.shape) % 2)


@dataclass(frozen=True)
class Mask(Solver):
    """Every second entry of the inner change, and the change before it."""

    inner: Solver
    whole: list = field(default_factory=list)

    def solve(self, problem):
        change = self.inner.solve(problem).dense
        self.whole.append(change)
        return Update(every_second(change))


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 99), name=st.sampled_from([*SOLVERS])
)
def test_any_split_of_a_filtered_stream_is_one_batch_but_for_its_last_error(sizes, seed, name):
    stream, inner = Stream.of(sum(sizes), seed), SOLVERS[name]
    once = stream.run(inner, [sum(sizes)])[0]
    plain = stream.run(FromScratch(inner), sizes)[0]
    torch.testing.assert_close(plain, once, rtol=0, atol=1e-10)
    solver = Mask(FromScratch(inner))
    weight = stream.run(solver, sizes)[0]
    change = solver.whole[-1]
    error = every_second(change) - change
    torch.testing.assert_close(weight - error, once, rtol=0, atol=1e-10)


@pytest.mark.parametrize("inner", SOLVERS.values(), ids=SOLVERS)
def test_without_a_filter_it_is_the_sequence_with_a_history(inner):
    stream = Stream.of(7, 5)
    torch.testing.assert_close(
        stream.run(FromScratch(inner), [3, 2, 2])[0], stream.run(inner, [3, 2, 2])[0], rtol=0, atol=1e-10
    )


def test_facts_that_are_left_out_leave_nothing_behind():
    stream, solver = Stream.of(7, 8), FromScratch(LeastSquares(0.3))
    weight, history = stream.run(solver, [5, 2])
    rows = torch.tensor([5, 6])
    again = solver.solve(stream.problem(rows, weight, history.without({"5", "6", "1"}))).dense
    others = [0, 2, 3, 4, 5, 6]
    rest = Stream(stream.keys[others], stream.values[others], stream.original, stream.covariance)
    once = rest.run(LeastSquares(0.3), [6])[0]
    torch.testing.assert_close(weight + again, once, rtol=0, atol=1e-10)


def test_weighted_keys_count_as_often_with_their_values():
    stream, solver = Stream.of(5, 2), FromScratch(LeastSquares(0.3))
    weight, history = stream.original + 0.1, KeyHistory()
    history.append(stream.keys[:3], values=stream.values[:3])
    rows = torch.tensor([3, 4])
    got = solver.solve(stream.problem(rows, weight, history.weighted(torch.tensor([2.0, 1.0, 0.0]).double()))).dense
    twice = [0, 0, 1, 3, 4]
    rest = Stream(stream.keys[twice], stream.values[twice], stream.original, stream.covariance)
    torch.testing.assert_close(weight + got, rest.run(LeastSquares(0.3), [5])[0], rtol=0, atol=1e-10)


def test_a_history_without_values_is_refused():
    stream = Stream.of(3, 1)
    history = KeyHistory(stream.keys[:1])
    problem = stream.problem(slice(1, 3), stream.original + 1, history)
    for solver in (FromScratch(LeastSquares(0.3)), NullSpace(FromScratch(LeastSquares(0.3)))):
        with pytest.raises(ConfigError, match="FromScratch needs the keys of earlier edits with their values"):
            solver.solve(problem)
    unknown = replace(stream.problem(slice(1, 3), stream.original + 1, KeyHistory()), earlier=None)
    with pytest.raises(ConfigError, match="set history: true"):
        FromScratch(LeastSquares(0.3)).solve(unknown)
    assert torch.equal(
        FromScratch(LeastSquares(0.3)).solve(stream.problem(slice(0, 2), stream.original, KeyHistory())).dense,
        LeastSquares(0.3).solve(stream.problem(slice(0, 2), stream.original, KeyHistory())).dense,
    )
