"""Prefix trees: every context is read as if it stood alone."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cakeflow.forward.prefix_tree import grow, predict

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
    found = []
    for context, label in zip(contexts, labels, strict=True):
        logits = lm.model(input_ids=torch.tensor([context])).logits[0, -1].double()
        found.append((float(logits.log_softmax(-1)[label]), bool(logits.argmax() == label)))
    return found


@pytest.mark.parametrize("max_tokens", [1, 4096])
@pytest.mark.parametrize("branching", [True, False])
def test_predictions_equal_one_pass_per_context(tiny, max_tokens, branching):
    if not branching:
        tiny.model.config.sliding_window = 4  # shorter than the longest: rows may not branch
    first = [int(tiny.model(input_ids=torch.tensor([c])).logits[0, -1].argmax()) for c in CONTEXTS]
    for labels in (first, [3] * len(CONTEXTS)):
        logprobs, hits = predict(tiny, CONTEXTS, labels, max_tokens)
        tiny.model.config.sliding_window = None
        wanted = singly(tiny, CONTEXTS, labels)
        torch.testing.assert_close(logprobs, torch.tensor([each for each, _ in wanted]), rtol=0, atol=1e-5)
        assert hits.tolist() == [hit for _, hit in wanted]


def test_nothing_asked_nothing_said(lm):
    logprobs, hits = predict(lm, [], [])
    assert len(logprobs) == len(hits) == 0
