"""Routes of questions: what each module measured, and what is refused."""

import copy
import math

import pytest
import torch
from cakeflow_sidememory import Codebook, CodebookSettings, Route, ShardedProjection, ShardSettings, routes
from cakeflow_sidememory.shards import plain_weight

from cakeflow import EditRequest
from cakeflow.data import Probe
from cakeflow.errors import ConfigError, NumericalError, RequestError
from cakeflow.forward import encode_texts
from cakeflow.journal import request_hash
from cakeflow.models import Site

SITE = Site(3, "mlp_out")
RECORDS = [
    EditRequest(
        "The first letter of {}", "Lund", "a", "the",
        probes=(Probe("paraphrase", "In Lund"), Probe("neighborhood", "The river of Rome and Lund")),
    ),
    EditRequest("The first letter of {}", "Australia", "the"),
]  # fmt: skip
HASHES = [request_hash(record) for record in RECORDS]
PROMPTS = ["The first letter of Lund", "In Lund", "The river of Rome and Lund", "The first letter of Australia"]


def with_shards(lm, least, **settings):
    memory = ShardedProjection.around(lm.module(SITE), ShardSettings(activation="gelu_new", **settings))
    noise = torch.randn(memory.shards[0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = [plain_weight(memory.base) + size * noise for size in (0.1, 0.2)]
    lm.put(lm.architecture.path(SITE), memory.changed(weights[: len(least)], least, 1))
    return lm.module(SITE)


def test_distances_of_shards_are_those_of_a_pass_of_one_prompt(tiny):
    module = with_shards(tiny, [0.0, 1e9])
    rows = routes(tiny, RECORDS, HASHES[:1])
    assert [(row.record, row.kind, row.prompt) for row in rows] == [
        (0, "rewrite", PROMPTS[0]), (0, "paraphrase", PROMPTS[1]), (0, "neighborhood", PROMPTS[2]),
        (1, "rewrite", PROMPTS[3]),
    ]  # fmt: skip
    for row in rows:
        (ids,) = encode_texts(tiny.tokenizer, [row.prompt])
        with torch.no_grad():
            tiny(input_ids=torch.tensor([ids]), use_cache=False)
        assert row.distance == pytest.approx(float(module.distances[0, 0]))
        assert (row.decision, row.threshold, row.side) == (1, 0.0, "above")
        assert row.place == tiny.architecture.path(SITE)
        assert row.score == row.distance
    assert [row.own for row in rows] == [1, 1, 0, None]


def test_without_an_answer_it_is_the_largest_distance(lm):
    module = with_shards(lm, [1e9, 1e8])
    rows = routes(lm, RECORDS[1:])
    assert rows[0].decision == 0
    assert rows[0].threshold == pytest.approx(0.88e8)
    assert rows[0].distance == pytest.approx(float(module.distances[1, 0]))


def test_two_shards_that_are_joined_have_one_threshold(lm):
    memory = with_shards(lm, [2.0, 3.0], rule="merge", ratio=1.0)
    lm.put(lm.architecture.path(SITE), memory.changed(list(memory.shards), [2.0, 3.0], 1, joined=True))
    (row,) = routes(lm, RECORDS[1:])
    assert row.threshold == 2.0
    assert row.decision == 2


def test_routes_of_a_codebook(lm):
    path, base = lm.architecture.path(SITE), lm.module(SITE)
    caught = []
    handle = base.register_forward_pre_hook(lambda _, args: caught.append(args[0][0, -1]))
    for prompt in PROMPTS:
        lm(input_ids=torch.tensor([lm.tokenizer(prompt)["input_ids"]]), use_cache=False)
    handle.remove()
    keys, values = torch.stack(caught).detach(), torch.zeros(2, lm.width, dtype=torch.float64)
    lm.put(path, Codebook(base, CodebookSettings(1e-6), keys[[0, 3]], values, [(1,), (2,)]))
    rows = routes(lm, RECORDS, HASHES)
    assert [row.decision for row in rows] == [1, 0, 0, 2]
    assert [row.own for row in rows] == [1, 1, 0, 2]
    expected = torch.cdist(keys, keys[[0, 3]]).min(1).values
    torch.testing.assert_close(torch.tensor([row.distance for row in rows], dtype=torch.float64), expected)
    assert {row.side for row in rows} == {"below"}
    assert rows[1].score == -rows[1].distance


def test_an_empty_codebook_is_far_from_everything(lm):
    lm.put(lm.architecture.path(SITE), Codebook.around(lm.module(SITE), CodebookSettings()))
    assert [(math.isinf(row.distance), row.decision) for row in routes(lm, RECORDS)] == [(True, 0)] * 4


def test_routes_do_not_depend_on_what_is_asked_beside(lm):
    with_shards(lm, [3.0])
    together = routes(lm, RECORDS)
    alone = routes(lm, RECORDS[:1]) + [row._replace(record=1) for row in routes(lm, RECORDS[1:])]
    for one, other in zip(together, alone, strict=True):
        assert one.distance == pytest.approx(other.distance, rel=1e-9)
        assert one._replace(distance=0) == other._replace(distance=0)


def test_what_is_refused(lm):
    with pytest.raises(ConfigError, match="no module of this model gives routes"):
        routes(lm, RECORDS)
    other = copy.deepcopy(lm)
    with_shards(other, [1.0], scope="token")
    with pytest.raises(ConfigError, match=r"decides on each token.*set scope to prompt"):
        routes(other, RECORDS)
    with_shards(lm, [float("nan")])
    with pytest.raises(NumericalError, match="threshold nan; a router needs numbers"):
        routes(lm, RECORDS)
    with pytest.raises(RequestError, match="has no token of its own after ''"):
        routes(lm, [EditRequest("{}", "", "a")])


def test_scope_of_a_route():
    row = Route(0, "paraphrase", "x", "place", 1.0, 2.0, "below", 0, 1)
    assert row.in_scope
    assert not row._replace(kind="neighborhood").in_scope
