"""Earlier edits that a side memory rehearses: which ones, and a stream that goes on rehearses the same."""

from dataclasses import replace

import pytest
import torch
from cakeflow_sidememory import LearningRule, Margin, Rehearsal, SideMemory, learn, original_weight
from cakeflow_sidememory.learning import scope_distances
from cakeflow_sidememory.rehearsals import Rehearsals, shard_ranges
from cakeflow_sidememory.shards import ShardSettings
from hypothesis import given
from hypothesis import strategies as st
from test_cakeflow_sidememory import FACTS, QUIET, SITE, TEXTS, UNRELATED, hashes, logits
from test_cakeflow_sidememory_learning import problem_of

from cakeflow import Contexts, Editor
from cakeflow.errors import ConfigError

SHARDS = ShardSettings(save_every=1, join_every=100, ratio=0.5)
RULE = LearningRule(lr=4.0, steps=6, margin=Margin(0.5, 4.0, 2.0), clamp=None, rehearsal=True)


def editor_of(lm, rule=RULE, shards=SHARDS, **settings):
    plain = {"density": 0.5, "contexts": Contexts(), "irrelevant": UNRELATED[:2]}
    return Editor(SideMemory(lm, SITE.layer, rule=rule, shards=shards, **{**plain, **settings}), QUIET)


@given(st.integers(0, 60), st.integers(1, 5), st.integers(1, 4))
def test_shards_have_each_edit_once(edits, every, times):
    ranges = shard_ranges(edits, ShardSettings(save_every=every, join_every=every * times))
    assert [number for each in ranges for number in each] == list(range(edits))
    assert len(ranges[-1]) == edits % every
    assert {len(each) for each in ranges[:-1]} <= {every, every * times}


@pytest.mark.parametrize("control", ["always", "distance"])
def test_without_a_router_all_facts_are_in_one_shard(tiny, control):
    """Else full shards would be put away, and every text go to an empty one, which says what the projection says."""
    plain = logits(tiny, TEXTS)
    editor_of(tiny, shards=ShardSettings(save_every=2, join_every=4, control=control)).fit(FACTS, 2)
    memory = tiny.module(SITE)
    if control == "distance":
        assert len(memory.shards) == 2
        return
    assert len(memory.shards) == 1
    assert [memory.own(fact) for fact in range(5)] == [1, 1, 1, 1, 0]
    assert not any(torch.equal(*pair) for pair in zip(logits(tiny, TEXTS), plain, strict=True))
    assert memory.decision.unique().tolist() == [1]


def test_nothing_is_rehearsed_in_the_first_shard():
    rehearsals = Rehearsals(lambda number: pytest.fail(f"edit {number} was read"))
    assert rehearsals.draw(3, ShardSettings(save_every=4, join_every=4), 10, 0) == ([], [])


def test_edits_of_other_shards_come_whole_and_of_the_own_one_at_random(tiny):
    edits = [Rehearsal(*([torch.tensor(float(n))] * 2), torch.tensor([n]), torch.zeros(1), abs) for n in range(8)]
    rehearsals = Rehearsals(edits.__getitem__)
    rehearsals.keep(7, edits[7])
    others, own = rehearsals.draw(7, ShardSettings(save_every=2, join_every=4), 40, 5)
    assert [[int(each.rows) for each in shard] for shard in others] == [[0, 1, 2, 3], [4, 5]]
    assert len(own) == 40
    assert {int(each.rows) for each in own} == {6, 7}
    again = rehearsals.draw(7, ShardSettings(save_every=2, join_every=4), 40, 5)[1]
    assert [each is other for each, other in zip(own, again, strict=True)] == [True] * 40


def test_an_edit_taken_back_is_forgotten():
    read = []
    edits = [Rehearsal(torch.ones(1), torch.ones(1), torch.tensor([0]), torch.zeros(1), abs) for _ in range(3)]
    rehearsals = Rehearsals(lambda number: read.append(number) or edits[number])
    for number in (0, 1, 0):
        rehearsals.keep(number, edits[number])
    rehearsals.draw(2, ShardSettings(save_every=2, join_every=2), 0, 0)
    assert read == [1]


def test_distances_are_those_of_the_threshold(tiny):
    problem = problem_of(tiny)
    weight = torch.randn(problem.main.shape[-1], problem.inputs.shape[-1], dtype=problem.inputs.dtype)
    expected = scope_distances(problem.rows, problem.distances(problem.answer(weight)))[2]
    torch.testing.assert_close(problem.rehearsal.distances(weight), expected, rtol=1e-12, atol=1e-12)


def test_a_new_shard_has_no_distance_and_no_gradient(tiny):
    """The norm's gradient at 0 is 0; a rounding error there would have a gradient of length 1."""
    leaf = original_weight(tiny, SITE).clone().requires_grad_()
    distances = problem_of(tiny).rehearsal.distances(leaf)
    (gradient,) = torch.autograd.grad(distances.sum(), leaf)
    assert not distances.any()
    assert not gradient.any()


def test_a_step_goes_against_both_bounds(tiny):
    """One step with a rehearsed edit of either kind, against the formula of WISE's appendix B.3."""
    problem, weight = problem_of(tiny), original_weight(tiny, SITE) + 0.5
    rule = replace(RULE, lr=0.5, steps=1, margin=None, decay=0.0)
    mask = torch.ones_like(weight).bool()
    plain = learn(problem, weight, mask, rule).weight
    both = learn(problem, weight, mask, rule, [[problem.rehearsal]], [problem.rehearsal]).weight
    leaf = weight.clone().requires_grad_()
    distances = problem.rehearsal.distances(leaf)
    assert (distances > 5).any() or (distances < 20).any()
    below, above = torch.relu(distances - 5), torch.relu(20 - distances)
    loss = sum(each.sum() / (each > 0).sum().clamp_min(1) for each in (below, above))
    (gradient,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(plain - both, rule.lr * gradient, rtol=1e-9, atol=1e-12)


def test_shards_are_kept_apart(tiny):
    """With rehearsal the second shard is excited less by the first one's edit."""
    rule, distances = LearningRule(4.0, 60, Margin(0.5, 30.0, 2.0), clamp=None), {}
    for rehearsal in (False, True):
        editor = editor_of(tiny, replace(rule, rehearsal=rehearsal))
        editor.fit(FACTS[:2], 1, evaluate=False)
        second = editor.module.memory().shards[2].detach()
        with torch.no_grad():
            distances[rehearsal] = float(editor.module._recorded(0).distances(second).mean())
        editor.rollback()
    assert distances[True] < 0.75 * distances[False]


def test_a_run_that_goes_on_rehearses_the_same(tiny, tmp_path):
    whole = editor_of(tiny)
    whole.fit(FACTS, 1, evaluate=False)
    expected = hashes(tiny)
    whole.rollback()
    parts = editor_of(tiny)
    for fact in FACTS:
        parts.fit([fact], 1, evaluate=False)
    assert hashes(tiny) == expected
    parts.rollback()


def test_facts_that_are_not_on_record_cannot_be_rehearsed(lm, tmp_path):
    editor = editor_of(lm, record_texts=False)
    editor.fit(FACTS[:1], 1, evaluate=False, run_dir=tmp_path / "run")
    for step in editor.journal:
        step.requests = ()
    with pytest.raises(ConfigError, match="rehearsal=True needs the texts of earlier facts"):
        editor.fit(FACTS[1:2], 1, evaluate=False)


def test_shards_that_are_joined_are_not_kept_apart(lm):
    with pytest.raises(ConfigError, match="rehearsal=True keeps shards apart"):
        editor_of(lm, shards=ShardSettings("merge", save_every=1, join_every=2))
