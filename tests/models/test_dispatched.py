"""A model spread over devices is edited where its weights live, with the numbers of one device."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from accelerate import cpu_offload
from conftest import FACTS, fit_tiny
from places import Places, place, spread

from cakeflow import Editor, LocateThenEdit
from cakeflow.allocators import Jacobian
from cakeflow.core.statistics import Statistics
from cakeflow.errors import ArchitectureError
from cakeflow.models import Site
from cakeflow.solvers import Descent, EqualityConstrained, LeastSquares, NullSpace
from cakeflow.targets import GradientSearch
from cakeflow.tracing import CausalTrace
from cakeflow.tracing.facts import trace_row

HOME = "xla:0"  # a name that torch knows and that no branch of ours asks for
LAYERS = [1, 2, 3]
PARTS = {
    "alphaedit": {"solver": NullSpace(LeastSquares(ridge=1.0), threshold=2.0)},
    "memit": {"solver": LeastSquares(ridge=0.0)},
    "primal": {"solver": LeastSquares(form="primal")},
    "rome": {"solver": EqualityConstrained(at="prompt")},
    "exact": {"allocator": Jacobian()},
    "pmet": {"targets": GradientSearch(steps=3, site="mlp_out", extra_site="attn_out")},
    "ft": {"solver": Descent(steps=2)},
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_a_dispatched_model_is_edited_where_its_weights_live(tiny, requests, quiet, parts):
    parts = {"targets": GradientSearch(steps=3), **parts}
    alone = copy.deepcopy(tiny)
    fit_tiny(alone, LAYERS, requests[:4], quiet, 1.0, **parts)
    before = [tiny.weight(Site(layer, "mlp_out")).clone() for layer in LAYERS]
    spread(tiny, HOME, [f"xla:{i % 3}" for i in range(tiny.depth)])
    with Places():
        module = fit_tiny(tiny, LAYERS, requests[:4], quiet, 1.0, **parts)
    assert [place(tiny.weight(Site(layer, "mlp_out"))) for layer in LAYERS] == ["xla:1", "xla:2", "xla:0"]
    for layer in LAYERS:
        torch.testing.assert_close(
            tiny.weight(Site(layer, "mlp_out")), alone.weight(Site(layer, "mlp_out")), rtol=1e-12, atol=1e-14
        )
    with Places():
        module.journal.rollback()
    assert all(torch.equal(tiny.weight(Site(layer, "mlp_out")), old) for layer, old in zip(LAYERS, before, strict=True))


def test_a_dispatched_model_is_measured_like_any_other(tiny, requests, quiet):
    """Statistics, sampled contexts, metrics, generation and a trace, over three devices and over one."""
    result = []
    for lm in (copy.deepcopy(tiny), tiny):
        if lm is tiny:
            spread(tiny, HOME, [f"xla:{i % 3}" for i in range(tiny.depth)])
        with Places() if lm is tiny else nullcontext():
            settings = Statistics(tokens=600, window=32)
            editor = Editor(LocateThenEdit(lm, LAYERS, statistics=settings, targets=GradientSearch(steps=2)), quiet)
            run = editor.fit(requests[:2])
            trace = CausalTrace(draws=2).run(lm, [trace_row(lm, FACTS[0])], [1, 2])
            result.append([*run.before.values(), *run.after.values(), *trace.scores.values()])
    torch.testing.assert_close(*map(torch.tensor, result), rtol=1e-9, atol=1e-12, equal_nan=True)


def test_an_offloaded_layer_is_refused(tiny):
    """A change to it would be lost: its weights lie in accelerate's hands and come anew with every pass."""
    last = tiny.depth - 1
    cpu_offload(tiny.model.get_submodule(tiny.architecture.block.format(last)), execution_device=torch.device("cpu"))
    with pytest.raises(ArchitectureError, match=rf"\.{last}\.\S* is offloaded"):
        LocateThenEdit(tiny, [last])
    with pytest.raises(ArchitectureError, match="is offloaded and cannot be read"):
        tiny.fingerprint()
    assert len(tiny.fingerprint(last)) == 64


def test_a_device_map_by_name(workplace, lm):
    """``device_map`` goes to transformers; what it puts on the disk cannot be edited, and says so before an edit."""
    last = lm.depth - 1
    names = ["transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"]
    names += [f"transformer.h.{i}" for i in range(last)]
    places = {**dict.fromkeys(names, "cpu"), f"transformer.h.{last}": "disk"}
    load = {"device_map": places, "offload_folder": str(workplace / "offload")}
    module = LocateThenEdit(str(workplace / "model"), [1], model_kwargs=load)
    module.setup()
    assert module.lm.model.hf_device_map == places
    assert torch.equal(module.lm.weight(Site(1, "mlp_out")), lm.weight(Site(1, "mlp_out")))
    with pytest.raises(ArchitectureError, match=rf"\.{last}\.\S* is offloaded"):
        LocateThenEdit(str(workplace / "model"), [1, last], model_kwargs=load).setup()


def test_places_that_meet_are_an_error():
    """The guard guards: what CUDA refuses is refused, what it takes is taken, and a move changes the label only."""
    with Places():
        here, there = torch.ones(2, device="xla:0"), torch.ones(2, device="xla:1")
        with pytest.raises(RuntimeError, match="add: tensors on"):
            here + there
        assert str((here + there.to(here)).device) == "xla:0"
        assert str((here.sum() + there).device) == "xla:1"
        assert str(there[:1].cpu().device) == "cpu"
