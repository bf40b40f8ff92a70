"""Keys without what names have in common, against an explicit projector; moments against full passes."""

import json
from dataclasses import replace

import pytest
import torch
from cakeflow_streams import MinorSpace
from hypothesis import given
from hypothesis import strategies as st

from cakeflow import LayerProblem, LeastSquares, Statistics
from cakeflow.errors import ConfigError, NumericalError, ShapeError
from cakeflow.forward import names
from cakeflow.forward.corpus import name_rows
from cakeflow.models import Site
from cakeflow.models.hooks import capture
from cakeflow.solvers import Covariance, KeyHistory
from cakeflow.testing import SolverContract

WIDTH, OUT = 9, 4


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem(seed=0):
    factor, nothing = randn(WIDTH, WIDTH, seed=seed), torch.zeros(OUT, WIDTH, dtype=torch.float64)
    keys, residual, earlier = (
        randn(3, WIDTH, seed=seed + 1),
        randn(3, OUT, seed=seed + 2),
        randn(5, WIDTH, seed=seed + 3),
    )
    return LayerProblem(keys, residual, nothing, nothing, Covariance(factor @ factor.T, 2.0), KeyHistory(earlier))


@given(st.sampled_from([0.1, 0.4, 0.6]), st.integers(0, 99))
def test_keys_lose_the_leading_eigenvectors(energy, seed):
    task = problem(seed)
    values, vectors = torch.linalg.eigh(task.covariance.moment)
    values, vectors, count = values.flip(0).tolist(), vectors.flip(1), 0
    while sum(values[:count]) <= energy * sum(values):
        count += 1
    P = torch.eye(WIDTH, dtype=torch.float64) - vectors[:, :count] @ vectors[:, :count].T
    K, S = task.keys @ P, task.history.keys @ P
    system = K.T @ K + S.T @ S + 10 * torch.eye(WIDTH, dtype=torch.float64)
    update = MinorSpace(energy=energy).solve(task)
    torch.testing.assert_close(update.dense, task.residual.T @ K @ torch.linalg.inv(system), rtol=0, atol=1e-10)
    assert update.is_plain


def test_no_energy_is_the_inner_solve():
    task = problem()
    assert torch.equal(MinorSpace(LeastSquares(0.3), 0.0).solve(task).dense, LeastSquares(0.3).solve(task).dense)


def test_missing_needs_and_bad_settings():
    with pytest.raises(ShapeError, match="MinorSpace needs the covariance"):
        MinorSpace().solve(replace(problem(), covariance=None))
    with pytest.raises(NumericalError, match=r"all 9 eigenvectors .* 0.9999999999999.* of its trace"):
        MinorSpace(energy=0.9999999999999).solve(problem())
    for energy in (1.0, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="energy must lie"):
            MinorSpace(energy=energy)


def test_moments_are_those_of_full_passes_at_the_ends_of_names(tiny, tmp_path):
    """From a file of names, in passes of one and of several padded rows, in a place of their own in the cache."""
    chosen, site = names()[:7], Site(2, "mlp_out")
    (tmp_path / "names.jsonl").write_text("".join(json.dumps({"text": name}) + "\n" for name in chosen))
    keys = []
    for name in chosen:
        with capture(tiny, [site], side="in") as inputs, torch.no_grad():
            tiny(input_ids=torch.tensor([tiny.tokenizer(name)["input_ids"]]))
        keys.append(inputs[site][0, -1])
    expected = torch.stack(keys).T @ torch.stack(keys) / len(chosen)
    settings = Statistics(tmp_path / "names.jsonl", at="names", null_threshold=0.5)
    for tokens in (1, 4096):
        collected = replace(settings, batch_tokens=tokens).collect(tiny, [site], tmp_path / str(tokens))[site]
        torch.testing.assert_close(collected.moment, expected, rtol=0, atol=1e-10)
        assert (int(collected.curve[-1, 0]), collected.threshold) == (7, 0.5)
    everything = Statistics(tmp_path / "names.jsonl", tokens=500, window=8).windows(tiny, 2)
    assert not torch.equal(settings.windows(tiny, 2), everything)
    assert torch.equal(Statistics(at="names").windows(tiny, 2), name_rows(tiny, names()))
    with pytest.raises(ConfigError, match=r"statistics\.at must be one of tokens, names"):
        Statistics(at="name")


class TestMinorSpace(SolverContract):
    solver = MinorSpace(energy=0.3)
