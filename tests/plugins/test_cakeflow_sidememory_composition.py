"""Retrieval and composition: their algebra, and the rules of the official code."""

import pytest
import torch
from cakeflow_sidememory.composition import (
    Retrieval,
    compose,
    composed_change,
    conflicts,
    distinct,
    outermost,
    read_representations,
    require_edits,
    similarities,
)
from cakeflow_sidememory.factors import Factors
from hypothesis import given
from hypothesis import strategies as st

from cakeflow.errors import ConfigError, RequestError
from cakeflow.forward import Row, encode
from cakeflow.models import Site

numbers = st.sampled_from([-2.5, -1.0, -0.1, 0.0, 0.1, 0.3, 7.0])
rows_of_changes = st.integers(1, 5).flatmap(
    lambda n: st.lists(st.lists(numbers, min_size=6, max_size=6), min_size=n, max_size=n)
)


def factors_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(count, size, generator=generator, dtype=torch.float64) for size in (5, 9)]
    return Factors(*draw, torch.rand(count, 9, generator=generator) < 0.7, 2.0)


X = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@given(rows_of_changes, st.randoms(use_true_random=False))
def test_the_order_of_edits_does_not_matter_to_the_bit(changes, random):
    shuffled = random.sample(changes, len(changes))
    assert torch.equal(compose(torch.tensor(changes)), compose(torch.tensor(shuffled)))


@given(rows_of_changes)
def test_composition_is_the_papers_rule_element_by_element(changes):
    composed = compose(torch.tensor(changes, dtype=torch.float64)).tolist()
    for place, total in enumerate(composed):
        column = [each[place] for each in changes]
        disagree = any(a * b < 0 for a in column for b in column)
        assert total == pytest.approx(0 if disagree else sum(column), abs=1e-12)


@given(rows_of_changes)
def test_an_edit_with_its_negative_is_nothing(changes):
    both = torch.tensor([*changes, *[[-x for x in each] for each in changes]])
    assert not compose(both).any()
    assert torch.equal(conflicts(both), (both != 0).any(0))


def test_no_edit_changes_nothing():
    assert torch.equal(composed_change(factors_of(2), (), X), torch.zeros(3, 9, dtype=torch.float64))


def test_an_edit_with_itself_is_itself():
    factors = factors_of(2)
    alone = factors.part([1]).changes(X)[0]
    assert torch.equal(composed_change(factors, [1, 1], X), alone)
    twice = Factors.join([factors, factors.part([1])])  # stored twice
    assert distinct(twice, [2, 1, 0]) == (0, 1)
    assert torch.equal(composed_change(twice, [1, 2], X), alone)


@given(st.permutations([0, 1, 2, 3]), st.permutations([0, 2, 3]))
def test_neither_the_order_in_store_nor_of_retrieval_matters(stored, edits):
    factors = factors_of(4)
    moved = [stored.index(i) for i in edits]
    assert torch.equal(composed_change(factors.part(stored), moved, X), composed_change(factors, edits, X))


def test_the_official_rule_joins_the_outermost_and_doubles_one():
    factors = factors_of(4)
    changes = factors.changes(X)
    ends = changes[0] + changes[3]
    ends[changes[0] * changes[3] < 0] = 0
    torch.testing.assert_close(composed_change(factors, [3, 1, 0], X, "outermost"), ends)
    torch.testing.assert_close(composed_change(factors, [2], X, "outermost"), 2 * changes[2])
    torch.testing.assert_close(composed_change(factors.part([2]), [0], X, "outermost"), changes[2])
    assert not composed_change(factors, [], X, "outermost").any()
    assert (outermost([5, 2, 4], 9), outermost([], 9)) == ((2, 5), ())


def test_edits_that_are_not_stored_and_other_rules_are_refused():
    with pytest.raises(ConfigError, match=r"edits -1, 4 are not stored; there are 2"):
        require_edits([4, 0, -1], 2)
    with pytest.raises(ConfigError, match="are not stored"):
        composed_change(factors_of(2), [2], X)
    with pytest.raises(ConfigError, match="rule must be one of agreeing, outermost"):
        composed_change(factors_of(2), [0], X, "sum")
    assert require_edits([1, 0, 1], 2) == (0, 1)


# ---- retrieval ----


def test_threshold_and_top_choose_edits():
    similarity = torch.tensor([0.6, 0.9, 0.5, 0.7, 0.9])

    def retrieved(threshold, top):
        return tuple(Retrieval(threshold, top).decide(similarity).nonzero()[:, 0].tolist())

    assert retrieved(0.5, 4) == (0, 1, 3, 4)
    assert retrieved(0.5, 2) == (1, 4)
    assert retrieved(0.5, 1) == (1, 4)  # equal edits come together
    assert retrieved(0.5, 3) == (1, 3, 4)
    assert retrieved(0.5, 5) == (0, 1, 3, 4)  # the threshold itself is not above it
    assert retrieved(0.95, 3) == ()


@given(st.lists(st.sampled_from([0.2, 0.6, 0.7, 0.9]), min_size=1, max_size=8), st.integers(1, 5), st.randoms())
def test_neither_order_nor_rounding_decides_among_equal_edits(values, top, random):
    """Edits are retrieved if fewer than ``top`` are more similar; a memory with fewer has them all in reach."""
    places = random.sample(range(len(values)), len(values))
    noise = [random.uniform(-2e-5, 2e-5) for _ in values]
    noisy = torch.tensor([[values[i] + noise[i] for i in places]])
    decided = Retrieval(0.5, top).decide(noisy)[0].tolist()
    expected = [value > 0.5 and sum(other > value for other in values) < top for value in values]
    assert decided == [expected[i] for i in places]


def test_bad_settings_are_refused():
    for settings in ({"top": 0}, {"top": True}, {"threshold": 1.5}, {"part": "key"}):
        with pytest.raises(ConfigError, match="Retrieval"):
            Retrieval(**settings)


TEXTS = ["The Eiffel Tower is located in the city of Rome", "Hamlet was written by William Shakespeare"]


def edits_of(lm):
    return encode(lm.tokenizer, TEXTS, [len("The Eiffel Tower"), len("Hamlet")], [TEXTS[0].index("Rome") - 1, 21])


def outputs(lm, ids, layer):
    """The down projection's output at each token of one text, by a hook of our own."""
    states = []
    handle = lm.module(Site(layer, "mlp_out")).register_forward_hook(lambda _m, _a, out: states.append(out))
    lm(input_ids=torch.tensor([ids]), use_cache=False)
    handle.remove()
    return states[0].detach().view(len(ids), -1)


def test_representations_lie_at_their_tokens(tiny):
    rows = edits_of(tiny)
    states = read_representations(tiny, rows, 2, 1)
    for i, row in enumerate(rows):
        last, count = row.target - 1, len(row.ids) - row.target
        near = outputs(tiny, row.ids, 1)
        torch.testing.assert_close(states.key[i], outputs(tiny, row.ids, 2)[last])
        torch.testing.assert_close(states.subject[i], near[row.subject])
        torch.testing.assert_close(states.relation[i], near[last])
        torch.testing.assert_close(states.answer[i], near[last + count // 2 - 1])
    assert len(states) == 2


def test_a_question_is_as_similar_as_its_nearest_token():
    generator = torch.Generator().manual_seed(0)
    states, edits = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 4, 3), (5, 3)))
    mask = torch.tensor([[True, True, False, True], [False] * 4])
    similarity = similarities(states, mask, edits)
    for i, edit in enumerate(edits):
        near = [states[0, t] for t in (0, 1, 3)]
        best = max(float(x @ edit / (x.norm() * edit.norm())) for x in near)
        assert float(similarity[0, i]) == pytest.approx(best, abs=1e-12)
    assert (similarity[1] == -torch.inf).all()


def test_rows_without_subject_or_answer_are_refused(lm):
    with pytest.raises(ConfigError, match="rows 1 have no subject"):
        read_representations(lm, [Row((1, 2, 3), 0, 2), Row((1, 2, 3), -1, 2)], 2, 1)
    with pytest.raises(RequestError, match="has no token"):
        read_representations(lm, [Row((1, 2, 3), 0, 3)], 2, 1)
