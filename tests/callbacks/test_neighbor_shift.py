"""Predictions at neighborhood prompts before and after, against plain passes."""

import pytest
import torch

from cakeflow import EditRequest
from cakeflow.callbacks import NeighborShift
from cakeflow.errors import ConfigError

from .conftest import FACTS, fit


@torch.no_grad()
def predictions(lm, prompts):
    """Log-probabilities behind each prompt, in one plain pass each."""
    rows = [lm.tokenizer(prompt)["input_ids"] for prompt in prompts]
    return torch.stack([lm.model(torch.tensor([row])).logits[0, -1].double().log_softmax(-1) for row in rows])


def neighbors(limit):
    prompts = dict.fromkeys(p.prompt for fact in FACTS for p in fact.probes if p.kind == "neighborhood")
    return [prompt for prompt in prompts if prompt not in {fact.text for fact in FACTS}][:limit]


@pytest.mark.parametrize("limit", [20, None])
def test_divergence_and_overlap_of_neighbors(tiny, quiet, limit):
    prompts = neighbors(limit)
    assert len(prompts) > 16
    before = predictions(tiny, prompts)
    watcher = NeighborShift(limit)
    fit(tiny, quiet, [watcher])
    after = predictions(tiny, prompts)
    first, last = watcher.rows[0], watcher.rows[-1]
    assert (first["neighbors/kl"], first["neighbors/top10"]) == (pytest.approx(0, abs=1e-6), 1.0)
    kl = (before.exp() * (before - after)).sum(1).mean()
    assert last["neighbors/kl"] == pytest.approx(float(kl), rel=1e-3, abs=1e-7)
    assert last["neighbors/kl"] > 1e-6
    for k in (1, 5, 10):
        tops = [[set(row.topk(k).indices.tolist()) for row in each] for each in (before, after)]
        shares = [len(one & other) / k for one, other in zip(*tops, strict=True)]
        assert last[f"neighbors/top{k}"] == pytest.approx(sum(shares) / len(shares), abs=1e-6)


def test_facts_without_neighbors_are_not_measured(lm, quiet):
    watcher = NeighborShift()
    fit(lm, quiet, [watcher], facts=[EditRequest("{} lives in", "Ann", "Rome")])
    assert {name for row in watcher.rows for name in row} == {"neighbors/edits"}


def test_prompts_keep_to_the_memory_budget(lm, quiet):
    watcher = NeighborShift(9)
    module = fit(lm, quiet, [watcher])
    free = watcher.measure(module)
    module.max_bytes = 1000
    with pytest.raises(ConfigError, match=r"a neighborhood prompt of \d+ tokens takes about"):
        watcher.measure(module)
    module.max_bytes = 10**6
    assert watcher.measure(module) == pytest.approx(free, rel=1e-4, abs=1e-7)


def test_a_limit_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="limit must be a whole number of at least 1, got 0"):
        NeighborShift(0)
