"""Retrieval and composition: their algebra, the rules of the official code, and answers under a change."""

from itertools import pairwise

import pytest
import torch
from cakeflow_sidememory.composition import (
    Representations,
    Retrieval,
    answer,
    comma_tokens,
    compose,
    composed_change,
    conflicts,
    distinct,
    less_repeated,
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
    assert Retrieval(0.5, 4).choose(similarity) == (0, 1, 3, 4)
    assert Retrieval(0.5, 2).choose(similarity) == (1, 4)
    assert Retrieval(0.5, 1).choose(similarity) == (1,)
    assert Retrieval(0.5, 5).choose(similarity) == (0, 1, 3, 4)  # the threshold itself is not above it
    assert Retrieval(0.95, 3).choose(similarity) == ()


def test_fewer_edits_than_asked_and_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="top=4 edits cannot be retrieved, as 3 are stored"):
        Retrieval().choose(torch.ones(3))
    for settings in ({"top": 0}, {"threshold": 1.5}, {"part": "key"}):
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
    assert len(Representations.join([states, states])) == 4


def test_a_question_is_as_similar_as_its_nearest_token(tiny):
    rows = edits_of(tiny)
    states = read_representations(tiny, rows, 2, 1)
    similarity = similarities(tiny, rows, states, 1)
    for q, row in enumerate(rows):
        near = outputs(tiny, row.ids[: row.target], 1)
        for i, subject in enumerate(states.subject):
            best = max(float(x @ subject / (x.norm() * subject.norm())) for x in near)
            assert float(similarity[q, i]) == pytest.approx(best, abs=1e-9)
    assert similarity.diagonal().tolist() == pytest.approx([1, 1])


def test_rows_without_subject_or_answer_are_refused(lm):
    with pytest.raises(ConfigError, match="rows 1 have no subject"):
        read_representations(lm, [Row((1, 2, 3), 0, 2), Row((1, 2, 3), -1, 2)], 2, 1)
    with pytest.raises(RequestError, match="has no token"):
        read_representations(lm, [Row((1, 2, 3), 0, 3)], 2, 1)


# ---- answers ----


def up(lm):
    names = dict(lm.module(Site(5)).named_modules())
    return Site(5, "mlp.up_proj" if "mlp.up_proj" in names else "mlp.c_fc")


def test_without_a_change_the_answer_is_the_models(tiny):
    ids = list(edits_of(tiny)[0].ids)
    zeros = torch.zeros(tiny.key_width(Site(5, "mlp_out")), dtype=torch.float64)
    tokens, logits = answer(tiny, ids, up(tiny), lambda x: zeros.expand(len(x), -1), tokens=5)
    for step, row in enumerate(logits):
        text = torch.tensor([[*ids, *tokens[:step]]])
        torch.testing.assert_close(row, tiny(input_ids=text, use_cache=False).logits[0, -1], rtol=1e-6, atol=1e-6)
        assert tokens[step] == int(row.argmax())


def test_a_change_acts_from_the_last_token_of_the_question_on(tiny):
    ids = list(edits_of(tiny)[1].ids)
    bias = torch.linspace(-1, 1, tiny.key_width(Site(5, "mlp_out")), dtype=torch.float64)
    tokens, logits = answer(tiny, ids, up(tiny), lambda x: bias.expand(len(x), -1), tokens=3)

    def change(_module, _args, output):
        return output + bias * (torch.arange(output.shape[1]) >= len(ids) - 1)[None, :, None]

    handle = tiny.module(up(tiny)).register_forward_hook(change)
    plain = tiny(input_ids=torch.tensor([[*ids, *tokens[:-1]]]), use_cache=False).logits[0, len(ids) - 1 :]
    handle.remove()
    torch.testing.assert_close(logits, plain, rtol=1e-6, atol=1e-6)


def test_an_answer_ends_with_the_text_and_needs_a_question(lm):
    zeros = torch.zeros(1, lm.key_width(Site(5, "mlp_out")), dtype=torch.float64)
    with torch.no_grad():
        lm.tokenizer.eos_token = lm.tokenizer.convert_ids_to_tokens(
            answer(lm, [7, 8], up(lm), lambda _: zeros, 1)[0][0]
        )
    assert len(answer(lm, [7, 8], up(lm), lambda x: zeros.expand(len(x), -1))[0]) == 1
    with pytest.raises(ConfigError, match="the question has no token"):
        answer(lm, [], up(lm), lambda _: zeros)


def test_behind_a_comma_all_that_was_written_is_less_likely():
    logits = torch.tensor([20.0, -20.0, 3.0, 1.0])
    assert less_repeated(logits, [0, 1], {3}) is logits
    assert less_repeated(logits, [0, 1, 3, 0], {3}).tolist() == pytest.approx([2.0, -2.0, 3.0, 0.1])
    assert logits.tolist() == [20.0, -20.0, 3.0, 1.0]


def test_the_rule_for_commas_changes_an_answer(lm):
    ids = [7, 8, 9]
    zeros = torch.zeros(lm.key_width(Site(5, "mlp_out")), dtype=torch.float64)
    plain, _ = answer(lm, ids, up(lm), lambda x: zeros.expand(len(x), -1), tokens=12)
    ruled, _ = answer(lm, ids, up(lm), lambda x: zeros.expand(len(x), -1), tokens=12, commas=plain[:1])
    repeats = [sum(a == b for a, b in pairwise(tokens)) for tokens in (plain, ruled)]
    assert ruled[0] == plain[0]
    assert ruled != plain
    assert repeats[1] <= repeats[0]


def test_comma_tokens_are_commas(lm):
    assert {lm.tokenizer.decode([i]).strip() for i in comma_tokens(lm)} == {","}
