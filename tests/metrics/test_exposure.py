"""Exposure of subjects against a projection written out, and recall against a sort."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cakeflow import LeastSquares
from cakeflow.errors import ShapeError
from cakeflow.metrics.exposure import SubjectRecall, exposure
from cakeflow.solvers import Covariance, KeyHistory, LayerProblem


def problem(seed, n=3, d_in=12, d_out=7):
    gen = torch.Generator().manual_seed(seed)
    keys, residual, weight, basis = (
        torch.randn(*shape, generator=gen, dtype=torch.float64)
        for shape in ((n, d_in), (n, d_out), (d_out, d_in), (d_in, d_in))
    )
    moment = basis @ basis.T / d_in + 0.1 * torch.eye(d_in, dtype=torch.float64)
    return LayerProblem(keys, residual, weight, weight.clone(), Covariance(moment), KeyHistory(), keys), moment, gen


@given(st.integers(0, 999))
def test_keys_that_a_solver_wrote_lie_in_its_change(seed):
    layer, moment, gen = problem(seed)
    change = LeastSquares().solve(layer).dense
    others = torch.randn(4, 12, generator=gen, dtype=torch.float64)
    values = exposure(change, torch.cat([layer.keys, others]), moment)
    assert values[:3].tolist() == pytest.approx([1.0] * 3, abs=1e-6)
    # the whitened rows of the change and a projection by normal equations
    root = torch.linalg.cholesky(moment)  # another square root of C: the row space turns with it
    span, white = change @ root, torch.linalg.solve(root, others.T)
    inside = span.T @ torch.linalg.pinv(span @ span.T, rtol=1e-8) @ span @ white
    assert values[3:].tolist() == pytest.approx((inside.norm(dim=0) / white.norm(dim=0)).tolist(), abs=1e-6)
    assert (values[3:] < 1).all()


def test_nothing_changed_gives_nothing_away():
    layer, moment, _ = problem(1)
    assert exposure(torch.zeros(7, 12), layer.keys, moment).tolist() == [0.0] * 3


@pytest.mark.parametrize("shapes", [((3, 11), (12, 12)), ((3, 12), (11, 11))])
def test_widths_that_differ(shapes):
    with pytest.raises(ShapeError, match="needs keys m x 12 and a second moment 12 x 12"):
        exposure(torch.zeros(7, 12), *map(torch.zeros, shapes))


@given(st.integers(0, 999), st.integers(1, 5))
def test_recall_is_that_of_a_sort(seed, count):
    scores = torch.rand(9, generator=torch.Generator().manual_seed(seed))
    edited = torch.arange(9) < count
    metric, other = SubjectRecall(), SubjectRecall()
    metric.update(scores[:4], edited[:4])
    other.update(scores[4:], edited[4:])
    metric.merge_state(other)
    top = sorted(range(9), key=lambda i: -scores[i])[:count]
    assert float(metric.compute()) == pytest.approx(sum(i < count for i in top) / count)
