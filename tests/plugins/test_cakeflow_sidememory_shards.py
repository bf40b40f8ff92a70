"""Shards and their router: who answers, what is put away, and how both are stored."""

import copy
from dataclasses import replace

import pytest
import torch
from cakeflow_sidememory import ShardChange, ShardedProjection, ShardEnd, ShardSettings, join
from cakeflow_sidememory.changes import packed, unpacked
from cakeflow_sidememory.shards import plain_weight
from hypothesis import given
from hypothesis import strategies as st

from cakeflow.errors import ConfigError, LedgerError, ShapeError
from cakeflow.forward import continuations
from cakeflow.models import Site

SITE = Site(3, "mlp_out")
SETTINGS = ShardSettings(save_every=2, join_every=4, activation="gelu_new")
TEXTS = ["The first letter of Lund", "She walked along the river", "of the"]


def place(lm):
    return lm.architecture.path(SITE)


def far(lm, seed=0, size=0.5):
    weight = plain_weight(lm.module(place(lm)) if not hasattr(lm.module(SITE), "base") else lm.module(SITE).base)
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed), dtype=weight.dtype)
    return weight + size * noise


def learned(lm, memory, weight, least=0.0, edits=1):
    """Put a side memory in place whose open shard has this weight."""
    lm.put(place(lm), ShardChange.of(place(lm), memory, weight, None, least, edits).build(lm.module(SITE)))
    return lm.module(SITE)


def around(lm, settings=SETTINGS):
    return ShardedProjection.around(lm.module(SITE), settings)


@pytest.mark.parametrize(("control", "same"), [("never", True), ("always", False)])
def test_controls(tiny, control, same):
    """One that never answers changes no bit, in a pass and in generated text; one that always does, changes all."""
    plain = copy.deepcopy(tiny)
    settings = replace(SETTINGS, control=control)
    learned(tiny, around(tiny, settings), far(tiny))
    ids = torch.tensor([tiny.tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        logits = [lm(input_ids=ids, use_cache=False).logits for lm in (tiny, plain)]
    assert torch.equal(*logits) is same
    assert (continuations(tiny, TEXTS, 5) == continuations(plain, TEXTS, 5)) is same
    assert tiny.module(SITE).decision.unique().tolist() == [int(not same)]


def test_the_most_excited_shard_above_its_threshold_answers(lm):
    settings = replace(SETTINGS, ratio=1.0)
    memory = learned(lm, around(lm, settings), far(lm, 0, 0.1))
    shards = [memory.shards[0].detach(), far(lm, 1, 0.5), far(lm, 2, 2.0)]
    ids = torch.tensor([lm.tokenizer(TEXTS[0])["input_ids"]])
    for least, answer in (
        ([0.0, 0.0, 0.0], 3), ([0.0, 0.0, 1e9], 2), ([0.0, 1e9, 1e9], 1), ([1e9, 1e9, 1e9], 0), ([1e9, 0.0, 1e9], 2),
    ):  # fmt: skip
        lm.put(place(lm), memory.changed(shards, least, 5))
        with torch.no_grad():
            lm(input_ids=ids, use_cache=False)
        assert lm.module(SITE).decision.tolist() == [answer]


def test_retrieve_keeps_shards_and_joins_them_when_due(lm):
    base = far(lm, size=0.0)
    memory, first, second = around(lm), far(lm, 1), far(lm, 2)
    memory = learned(lm, memory, first, least=3.0, edits=2).put_away()
    assert torch.equal(memory.shards[0], base)
    assert torch.equal(memory.shards[1], first)
    assert memory.least.tolist() == [float("inf"), 3.0]
    lm.put(place(lm), memory)
    memory = learned(lm, memory, second, least=2.0, edits=2).put_away()
    assert len(memory.shards) == 2
    torch.testing.assert_close(memory.shards[1].detach(), join(base, [first, second], [0.5, 0.5]))
    assert memory.least.tolist() == [float("inf"), 2.0]


def test_merge_weighs_the_earlier_join_and_keeps_the_threshold(lm):
    settings = replace(SETTINGS, rule="merge", save_every=1, join_every=2)
    base, weights = far(lm, size=0.0), [far(lm, seed) for seed in range(1, 5)]
    for number, weight in enumerate(weights):
        memory = learned(lm, around(lm, settings), weight, least=4.0 - number)
        lm.put(place(lm), memory.put_away())
        assert lm.module(SITE).candidates() == [[0, 1], [0, 1], [0, 1, 2], [0, 1]][number]
    first = join(base, weights[:2], [0.5, 0.5])
    torch.testing.assert_close(lm.module(SITE).shards[1].detach(), join(base, [*weights[2:], first], [0.2, 0.2, 0.6]))
    assert float(lm.module(SITE).least[0]) == 1.0


def test_a_finished_shard_answers_before_it_is_joined(lm):
    """In WISE's code its facts are gone until the next join: with its constants from edit 500 to edit 1,000."""
    for unjoined in (True, False):
        settings = replace(SETTINGS, rule="merge", save_every=1, join_every=2, unjoined=unjoined)
        memory = learned(lm, around(lm, settings), far(lm), least=0.0).put_away()
        assert memory.candidates() == ([0, 1] if unjoined else [0])
        assert memory.own(0) == (2 if unjoined else 0)
        distances = torch.tensor([[0.0], [5.0]])[: len(memory.candidates())]
        assert memory.decide(distances + 1).tolist() == [2 if unjoined else 1]
        lm.put(place(lm), memory.base)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 10**6))
def test_masks_come_back_from_their_bits(rows, columns, seed):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.3
    assert torch.equal(unpacked(packed(mask), mask.shape), mask)
    with pytest.raises(ValueError, match="bytes are no mask of shape"):
        unpacked(torch.cat([packed(mask), torch.zeros(1, dtype=torch.uint8)]), mask.shape)


def test_other_settings_are_refused(lm):
    learned(lm, around(lm), far(lm))
    with pytest.raises(ConfigError, match="the side memory there has the settings"):
        around(lm, replace(SETTINGS, ratio=0.1))


@pytest.mark.parametrize("dense", [True, False])
def test_changes_come_back_from_their_tensors(lm, dense):
    memory, weight = around(lm), far(lm, 3)
    mask = torch.rand(weight.shape) < 0.2
    weight = torch.where(mask, weight, plain_weight(lm.module(SITE)))
    change = ShardChange.of(place(lm), memory, weight, None if dense else mask, 2.5, 3)
    again = ShardChange.from_tensors(place(lm), change.tensors())
    for each in (change, again):
        built = each.build(lm.module(SITE))
        assert torch.equal(built.shards[0], weight)
        assert (built.least.tolist(), int(built.edits)) == ([2.5], 3)
    end = ShardEnd.from_tensors(place(lm), ShardEnd(place(lm), SETTINGS).tensors())
    assert (end.place, end.settings) == (place(lm), SETTINGS)


@pytest.mark.parametrize(
    ("rule", "edits", "own"),
    [
        ("retrieve", 1, [1, 0]), ("retrieve", 2, [2, 2, 0]), ("retrieve", 3, [2, 2, 1]),
        ("retrieve", 4, [2, 2, 2, 2]), ("retrieve", 7, [2, 2, 2, 2, 3, 3, 1]),
        ("merge", 3, [2, 2, 1]), ("merge", 4, [2, 2, 2, 2]), ("merge", 7, [2, 2, 2, 2, 3, 3, 1]),
    ],
)  # fmt: skip
def test_a_fact_knows_its_shard(lm, rule, edits, own):
    """Two facts a shard, joined by twos; checked against the shards that a run leaves."""
    settings, marks = replace(SETTINGS, rule=rule), []
    for number in range(edits):
        memory = around(lm, settings)
        weight = memory.shards[0].detach().clone()
        weight[0, 0] = far(lm, size=0.0)[0, 0] + number // 2 + 1  # each shard its mark
        learned(lm, memory, weight)
        if (number + 1) % 2 == 0:
            lm.put(place(lm), lm.module(SITE).put_away())
    memory = lm.module(SITE)
    assert [memory.own(fact) for fact in range(len(own))] == own
    places = [0, *memory.candidates()]
    for fact in range(edits):
        if own[fact]:
            marks.append(float(memory.shards[places[own[fact]]][0, 0] - far(lm, size=0.0)[0, 0]))
    assert all(mark > 0 for mark in marks)


def test_a_shard_of_another_model_or_without_a_threshold_is_refused(lm):
    memory, weight = around(lm), far(lm, 3)
    mask = torch.rand(weight.shape) < 0.2
    for change in (
        replace(ShardChange.of(place(lm), memory, weight, mask, 2.5, 3), values=torch.zeros(3)),
        replace(ShardChange.of(place(lm), memory, weight, None, 2.5, 3), values=torch.zeros(3)),
        replace(ShardChange.of(place(lm), memory, weight, mask, 2.5, 3), bits=packed(mask[:2])),
    ):
        with pytest.raises(ShapeError, match="a memory belongs to the model that it was made for"):
            change.build(lm.module(SITE))
    tensors = ShardChange.of(place(lm), memory, weight, None, 2.5, 3).tensors()
    for least in (torch.tensor([float("nan")]), torch.empty(0)):
        with pytest.raises(LedgerError, match=r"has no threshold, but .*take it from a copy, or edit again"):
            ShardChange.from_tensors(place(lm), {**tensors, "least": least})
    for damage in ({"edits": torch.tensor([-1])}, {"edits": torch.empty(0).long()}, {"bits": torch.zeros(3).long()}):
        with pytest.raises(LedgerError, match=r"has .* facts and a mask of .*take it from a copy"):
            ShardChange.from_tensors(place(lm), {**tensors, **damage})
    with pytest.raises(LedgerError, match="values are not finite numbers"):
        ShardChange.from_tensors(place(lm), {**tensors, "values": tensors["values"] / 0})
    with pytest.raises(ConfigError, match="was not asked anything yet"):
        memory.measured()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "retreive"}, "rule must be one of retrieve, merge.*did you mean 'retrieve'"),
        ({"scope": "row"}, "scope must be one of sequence, prompt, token"),
        ({"join": "tie"}, "join must be one of ties"),
        ({"control": "nver"}, "control must be one of distance, always, never"),
        ({"save_every": 1.5, "join_every": 3}, "save_every must be a whole number"),
        ({"save_every": True}, "save_every must be a whole number"),
        ({"longest": 0}, "longest must be a whole number of at least 1"),
        ({"ratio": float("nan")}, "ratio=nan"),
        ({"ratio": float("inf")}, "ratio=inf"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ShardSettings(**settings)
