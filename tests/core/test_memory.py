"""What an edit takes beyond the model: counted from shapes, kept within a budget, measured."""

from __future__ import annotations

import copy
import gc
import platform
import subprocess
import sys
import weakref
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from cakeflow_restrain import Prune, Rect
from conftest import fit_tiny
from transformers import AutoModelForCausalLM

from cakeflow import Contexts, LocateThenEdit
from cakeflow.core.memory import Footprint, TokenCost, loss_tokens
from cakeflow.core.statistics import Statistics
from cakeflow.errors import ConfigError
from cakeflow.forward.loss import WeightLoss
from cakeflow.forward.packing import GIB
from cakeflow.forward.tokens import encode_batch
from cakeflow.models import Site
from cakeflow.models.language import LanguageModel
from cakeflow.solvers import Descent, EqualityConstrained, NullSpace
from cakeflow.targets import GradientSearch, Targets

CONTEXTS = Contexts((("{}",), ("Indeed, {}", "They say that {}")))


@pytest.fixture
def batch(tiny, requests):
    return encode_batch(tiny, requests, CONTEXTS)


def foresee(lm, batch, budget=None, **rest):
    return Footprint.estimate(
        lm, batch, [Site(1, "mlp_out"), Site(2, "mlp_out")], max_tokens=1024, max_bytes=budget, **rest
    )


def test_a_token_costs_the_same_in_every_block(tiny):
    costs = [TokenCost.above(tiny, Site(layer, "mlp_out")) for layer in range(tiny.depth)]
    graphs, caches = [cost.graph for cost in costs], [cost.cache for cost in costs]
    for kinds in (graphs, caches):
        steps = [low - high for low, high in pairwise(kinds)]
        assert 0 < max(steps) < 1.05 * min(steps)
    config = tiny.model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    assert caches[-2] == 2 * heads * config.hidden_size // config.num_attention_heads * 8
    assert caches[-1] == 0


@pytest.mark.parametrize("site", [None, Site(1, "mlp_out")])
def test_counting_keeps_nothing_of_the_model(tiny, site):
    lm = copy.deepcopy(tiny)
    gone = weakref.ref(lm.model)
    TokenCost.above(lm, site)
    del lm
    gc.collect()
    assert gone() is None


def test_all_of_a_model_keeps_more_than_what_is_above_its_first_block(tiny):
    whole, above = (TokenCost.above(tiny, site) for site in (None, Site(0, "mlp_out")))
    assert 1 < whole.graph / above.graph < 1.5 * tiny.depth / (tiny.depth - 1)


def test_as_many_tokens_run_together_as_fit(tiny):
    cost = TokenCost.above(tiny, None)
    row = 10 * (cost.graph + cost.through) + cost.logits
    assert cost.most_tokens([(10, 1)] * 9, None, 500) == 500
    assert cost.most_tokens([(10, 1)] * 9, 3 * row, 500) == 30
    assert cost.most_tokens([(10, 1)] * 9, 3 * row, 20) == 20
    assert cost.most_tokens([(10, 1), (20, 20)], row, 500) < 10
    assert cost.most_tokens([(10, 1)], row, 500, further=cost.graph) < 10
    assert cost.most_tokens([(10, 1)], -1.0, 500) == 1
    assert cost.most_tokens([], row, 500, "reading") == 500
    with pytest.raises(ConfigError, match=r"memory_budget is .* but reading takes about"):
        cost.most_tokens([(10, 1)], row - 1, 500, "reading")


def test_the_loss_of_a_batch_keeps_to_the_budget(tiny, batch):
    module = LocateThenEdit(tiny, [1, 2], contexts=CONTEXTS)
    assert loss_tokens(module.lm, Site(1, "mlp_out"), batch, module.max_bytes) == WeightLoss.max_tokens
    module.max_bytes = 2 * TokenCost.above(tiny, Site(1, "mlp_out")).graph * max(len(r[0].ids) for r in batch.rows)
    assert loss_tokens(module.lm, Site(1, "mlp_out"), batch, module.max_bytes) < 2 * max(
        len(rows[0].ids) for rows in batch.rows
    )


def test_shapes_suffice(tiny, batch):
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(tiny.model.config, dtype=tiny.dtype)
    empty = LanguageModel.wrap(shape, tiny.tokenizer)
    shape, real = (TokenCost.above(each, Site(2, "mlp_out")) for each in (empty, tiny))
    assert shape.graph == pytest.approx(real.graph, rel=0.15)  # attention keeps something else there
    assert replace(shape, graph=0) == replace(real, graph=0)
    assert foresee(empty, batch).stored == 0  # originals stay off a GPU
    assert foresee(tiny, batch).stored == sum(tiny.weight(Site(layer, "mlp_out")).nbytes for layer in (1, 2))
    assert foresee(empty, batch).targets == pytest.approx(foresee(tiny, batch).targets, rel=0.1)


def test_more_of_anything_takes_more(tiny, batch, requests):
    plain = foresee(tiny, batch)
    assert foresee(tiny, batch, earlier=50).solve > plain.solve
    assert foresee(tiny, batch, matrices=2).solve == plain.solve + 16 * tiny.weight(Site(1, "mlp_out")).numel()
    assert foresee(tiny, encode_batch(tiny, requests, Contexts())).targets < plain.targets
    half = copy.deepcopy(tiny)
    half.model.to(torch.bfloat16)
    assert foresee(half, batch).stored == 6 * sum(tiny.weight(Site(layer, "mlp_out")).numel() for layer in (1, 2))


def test_a_budget_is_kept_to(tiny, batch):
    free = foresee(tiny, batch)
    assert free.facts == len(batch)
    seen = set()
    for share in (0.9, 0.7, 0.5, 0.4):
        room = foresee(tiny, batch, free.peak * share)
        assert room.peak <= free.peak * share
        seen.add((room.facts, room.suffix_tokens))
    assert len(seen) == 4


def test_the_same_edit_within_a_budget(tiny, requests, quiet):
    """Facts do not influence each other, so neither do the parts in which their values are looked for."""
    targets, other = GradientSearch(steps=4), copy.deepcopy(tiny)
    module = fit_tiny(tiny, [1, 2], requests, quiet, 1.0, targets=targets, contexts=CONTEXTS)
    batch = encode_batch(other, requests, CONTEXTS)
    room = module.estimate(batch)
    tight = {"targets": targets, "contexts": CONTEXTS, "memory_budget": room.peak / 2 / GIB}
    again = fit_tiny(other, [1, 2], requests, quiet, 1.0, **tight)
    assert again.estimate(batch).suffix_tokens < room.suffix_tokens
    for layer in (1, 2):
        torch.testing.assert_close(
            other.weight(Site(layer, "mlp_out")), tiny.weight(Site(layer, "mlp_out")), rtol=1e-9, atol=1e-12
        )


def test_parts_of_a_batch_get_the_same_target_values(tiny, requests):
    batch, targets = encode_batch(tiny, requests, CONTEXTS), GradientSearch(steps=4)
    parts = list(batch.split(5))
    assert [len(part) for part in parts] == [5, 5, 2]
    result = Targets.join([targets.search(tiny, part, 2) for part in parts])
    for name, value in vars(targets.search(tiny, batch, 2)).items():
        torch.testing.assert_close(getattr(result, name), value, rtol=1e-9, atol=1e-12)


def test_a_budget_too_small_is_refused_before_anything(tiny, requests, quiet):
    before = {name: part.clone() for name, part in tiny.model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"memory_budget is 1e-05 GiB, but .* takes about .* GiB beyond the model"):
        fit_tiny(tiny, [1, 2], requests, quiet, 1.0, memory_budget=1e-5)
    assert all(torch.equal(part, before[name]) for name, part in tiny.model.state_dict().items())
    with pytest.raises(ConfigError, match="memory_budget must be above 0, got 0"):
        LocateThenEdit(tiny, [1], memory_budget=0)


def test_second_moments_in_several_passes(tiny, tmp_path):
    settings = Statistics(tokens=800, window=32)
    sites = [Site(layer, "mlp_out") for layer in (1, 2, 3)]
    whole = settings.collect(tiny, sites, tmp_path / "whole")
    parts = settings.collect(tiny, sites, tmp_path / "parts", max_bytes=1.0)
    assert all(torch.equal(whole[site].moment, parts[site].moment) for site in sites)


def test_solvers_say_what_they_hold():
    assert NullSpace().total_matrices() == EqualityConstrained().total_matrices() == 0
    assert Prune(Rect(NullSpace())).total_matrices() == Prune.matrices + Rect.matrices
    assert Descent().total_matrices() > 0


PEAK = """
import time
from pathlib import Path
import torch
from cakeflow.core import memory
from cakeflow.forward.packing import GIB
for reset in (memory.RESET, Path("/no/such/file")):
    memory.RESET = reset
    peak = memory.PeakMemory([torch.device("cpu")])
    peak.restart()
    large = torch.ones(2**26)  # a quarter of a GiB
    time.sleep(0.2)
    del large
    print(peak.bytes() / GIB)
    peak.restart()
    print(peak.bytes() / GIB)
"""


@pytest.fixture(scope="module")
def peaks():
    """What a process of its own measured, by the kernel's mark and by looking: what earlier tests left behind may be
    given back at any moment.
    """
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    numbers = [float(line) for line in done.stdout.split()]
    return {"mark": numbers[:2], "samples": numbers[2:]}


@pytest.mark.parametrize("way", ["mark", "samples"])
def test_the_peak_is_what_was_in_use(way, peaks):
    if way == "mark" and sys.platform != "linux":
        pytest.skip("only Linux has a mark")
    held, later = peaks[way]
    assert 0.24 < held < 0.4
    assert later < 0.2


def test_a_run_reports_its_peaks(tiny, requests, quiet):
    module = fit_tiny(tiny, [1, 2], requests[:2], quiet, 1.0, targets=GradientSearch(steps=2))
    assert {"targets", "keys", "solve"} <= set(module.peaks)
    edits = [peak for phase, peak in module.peaks.items() if phase != "evaluation"]
    assert module.trainer.callback_metrics["memory/peak"] == pytest.approx(max(edits) / GIB, rel=1e-5)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps nothing, or cannot be asked")
def test_freed_memory_is_given_back():
    code = """
import psutil, torch
from cakeflow.core.memory import give_back, loss_tokens
tensors = [torch.ones(25_000) for _ in range(2000)]
last = tensors.pop()  # above all that is freed
tensors.clear()
before = psutil.Process().memory_info().rss
give_back()
print(before - psutil.Process().memory_info().rss)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 150e6
