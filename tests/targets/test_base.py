"""The slot: wrappers, and targets in parts."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from conftest import fit_tiny

from cakeflow import Contexts, GradientSearch, LeastSquares
from cakeflow.core.config import build_module, shipped
from cakeflow.forward.tokens import encode_batch
from cakeflow.models.architecture import Site
from cakeflow.solvers import Descent
from cakeflow.targets import Targets, TargetSearch
from cakeflow.testing import TargetSearchContract

FAST = GradientSearch(steps=3, lr=0.3, site="mlp_out", max_tokens=77)


@dataclass(frozen=True)
class Halfway(TargetSearch):
    """Takes half of the way that another search proposes."""

    inner: TargetSearch = GradientSearch()
    calls: list[str] = field(default_factory=list, compare=False, repr=False)

    def search(self, lm, batch, layer, **options):
        self.calls.append("search")
        targets = self.inner.search(lm, batch, layer, **options)
        return replace(targets, values=(targets.values + targets.initial) / 2)

    def measure(self, lm, batch, layer, *, max_tokens=None):
        self.calls.append("measure")
        return self.inner.measure(lm, batch, layer, max_tokens=max_tokens)


class TestHalfway(TargetSearchContract):
    search = Halfway(GradientSearch(steps=4))


class TestGradientSearchElsewhere(TargetSearchContract):
    search = GradientSearch(steps=4, site="attn_out")
    layer = 0


def test_a_wrapper_takes_over_site_and_limit():
    wrapped = Halfway(Halfway(FAST))
    assert (wrapped.site, wrapped.max_tokens) == ("mlp_out", 77)
    assert wrapped.value_site(4) == Site(4, "mlp_out") == FAST.value_site(4)


def test_a_wrapper_changes_what_its_inner_search_found(tiny, requests):
    batch = encode_batch(tiny, requests[:3], Contexts())
    whole, half = FAST.search(tiny, batch, 2), Halfway(FAST).search(tiny, batch, 2)
    torch.testing.assert_close(half.values - half.initial, (whole.values - whole.initial) / 2)


def test_a_search_without_a_site_says_what_it_needs():
    class Nowhere(Halfway):
        inner = None

    for name in ("site", "max_tokens"):
        with pytest.raises(TypeError, match="Nowhere needs fields site and max_tokens, or a TargetSearch as inner"):
            getattr(Nowhere(inner=None), name)


@pytest.mark.parametrize(("solver", "expected"), [(LeastSquares(), "search"), (Descent(steps=1), "measure")])
def test_the_walk_searches_or_measures_as_the_solver_needs(tiny, requests, quiet, solver, expected):
    search = Halfway(FAST)
    module = fit_tiny(tiny, [2, 3], requests[:2], quiet, 1.0, solver=solver, targets=search)
    assert search.calls == [expected]
    steps = {"search": 3.0, "measure": 1.0}[expected]
    assert [target.steps for target in module.journal[-1].targets] == [steps, steps]


def test_a_wrapper_in_a_config(tmp_path):
    path = tmp_path / "half.yaml"
    inner = "{class_path: GradientSearch, init_args: {steps: 3, essence: {factor: 0.2}}}"
    path.write_text(f"model: {{targets: {{class_path: {__name__}.Halfway, init_args: {{inner: {inner}}}}}}}")
    targets = build_module([shipped("method")["memit"], path], layers=[1]).targets
    assert isinstance(targets, Halfway)
    assert (targets.inner.steps, targets.inner.essence.factor) == (3, 0.2)


def test_parts_join_in_their_order(tiny, requests):
    batch = encode_batch(tiny, requests[:5], Contexts())
    parts = [FAST.search(tiny, part, 2) for part in batch.split(2)]
    joined = Targets.join(parts)
    for name, value in vars(joined).items():
        assert torch.equal(value, torch.cat([getattr(part, name) for part in parts]))
    assert len(joined.loss) == 5
