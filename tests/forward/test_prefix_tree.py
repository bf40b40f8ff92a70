"""Prefix trees: every context is read as if it stood alone."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cakeflow.errors import ConfigError
from cakeflow.forward.packing import logits_bytes, pass_bytes
from cakeflow.forward.prefix_tree import grow, predict
from cakeflow.models import Site

tokens = st.lists(st.integers(0, 3), min_size=1, max_size=6).map(tuple)
many = st.lists(tokens, min_size=1, max_size=30)


def path(tree, node):
    """The tokens from the beginning to a node."""
    ids = []
    while node >= 0:
        ids.append(tree.ids[node])
        node = tree.parent[node]
    return tuple(reversed(ids))


@given(many, st.sampled_from([0, 4, 9, 256]))
def test_every_context_ends_at_its_node(contexts, size):
    trees, place = grow(contexts, size)
    assert set(place) == set(contexts)
    for context, (number, node) in place.items():
        assert path(trees[number], node) == context
    if size:
        assert all(len(tree.ids) <= max(size, *map(len, contexts)) for tree in trees)


@given(many)
def test_a_beginning_stands_there_once(contexts):
    """One tree has as many nodes as there are different beginnings; without branches, no row begins another."""
    (tree,), _ = grow(contexts)
    assert len(tree.ids) == len({context[:end] for context in contexts for end in range(1, len(context) + 1)})
    rows, _ = grow(contexts, 0)
    assert all(row.parent == list(range(-1, len(row.ids) - 1)) for row in rows)
    whole = sorted(tuple(row.ids) for row in rows)
    assert all(later[: len(one)] != one for one, later in pairwise(whole))


@given(many)
def test_ancestors_are_the_path(contexts):
    (tree,), place = grow(contexts)
    seen = tree.ancestors(len(tree.ids) + 2)
    for context, (_, node) in place.items():
        nodes = seen[node].nonzero().flatten()
        assert tuple(tree.ids[i] for i in nodes) == context
    assert torch.equal(seen[-2:], torch.eye(len(seen), dtype=torch.bool)[-2:])


CONTEXTS = [(7, 8, 9), (7, 8), (7, 8, 11, 12, 13), (20,), (7, 21, 5), (7, 8, 9)]


@torch.no_grad()
def singly(lm, contexts, labels):
    """One plain pass per context."""
    result = []
    for context, label in zip(contexts, labels, strict=True):
        logits = lm.model(input_ids=torch.tensor([context])).logits[0, -1].double()
        result.append((float(logits.log_softmax(-1)[label]), bool(logits.argmax() == label)))
    return result


@pytest.mark.parametrize("max_tokens", [1, 4096])
@pytest.mark.parametrize("branching", [True, False])
def test_predictions_equal_one_pass_per_context(tiny, max_tokens, branching):
    if not branching:
        tiny.model.config.sliding_window = 4  # shorter than the longest: rows may not branch
    first = [int(tiny.model(input_ids=torch.tensor([c])).logits[0, -1].argmax()) for c in CONTEXTS]
    for labels in (first, [3] * len(CONTEXTS)):
        logprobs, hits = predict(tiny, CONTEXTS, labels, max_tokens)
        tiny.model.config.sliding_window = None
        expected = singly(tiny, CONTEXTS, labels)
        torch.testing.assert_close(logprobs, torch.tensor([each for each, _ in expected]), rtol=0, atol=1e-5)
        assert hits.tolist() == [hit for _, hit in expected]


def test_nothing_asked_nothing_said(lm):
    logprobs, hits = predict(lm, [], [])
    assert len(logprobs) == len(hits) == 0


@pytest.mark.parametrize("max_bytes", [5e6, 8e6, 1e9])
@pytest.mark.parametrize("logits", [logits_bytes, lambda _: 60_000], ids=["few words", "many words"])
def test_predictions_keep_to_a_limit_of_bytes(tiny, max_bytes, logits, monkeypatch):
    """Counted at the first block and at the head."""
    contexts = [(*range(10, 10 + n), n) for n in range(1, 60)] + [(7, n) for n in range(80)]
    labels = [n % 50 for n in range(len(contexts))]
    free, tokens_of, ends_of = predict(tiny, contexts, labels), [], []
    monkeypatch.setattr("cakeflow.forward.prefix_tree.logits_bytes", logits)
    tiny.module(Site(0)).register_forward_pre_hook(lambda _, args: tokens_of.append(args[0].shape[:2].numel()))
    tiny.head.register_forward_hook(lambda _, args, logits: ends_of.append(logits.shape[1]))
    limited = predict(tiny, contexts, labels, max_bytes=max_bytes)
    assert max(tokens_of) * pass_bytes(tiny) <= max_bytes / 2
    assert max(ends_of) * logits(tiny) <= max_bytes / 2
    assert (len(ends_of) > 1) == (max_bytes < 1e9)
    assert torch.allclose(limited[0], free[0], atol=1e-6)
    assert torch.equal(limited[1], free[1])


def test_a_text_that_does_not_fit_is_refused_before_the_model_runs(tiny):
    with pytest.raises(ConfigError, match=r"memory_budget is .* scoring a text of 20 tokens takes about"):
        predict(tiny, [tuple(range(20))], [1], max_bytes=1000)
