"""The walk of one batch: which layers, and again over the facts that did not take."""

import copy
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
from journal.edits import bits, same
from tiny_runs import LAYERS, editor_of, module_of, name_of

from cakeflow import Contexts, EditRequest, GradientSearch, LeastSquares, Sequential, Uniform
from cakeflow.core.walk import Walk
from cakeflow.errors import (
    BlockedWarning,
    ConfigError,
    NotTakenWarning,
    NumericalError,
    RequestWarning,
    SharedKeyWarning,
)
from cakeflow.forward.fact_tokens import choose_tokens
from cakeflow.forward.keys import PromptStream
from cakeflow.forward.tokens import encode_batch
from cakeflow.journal.journal import Journal
from cakeflow.journal.steps import EditStep
from cakeflow.models.architecture import Site
from cakeflow.models.hooks import capture
from cakeflow.report import RunFolder
from cakeflow.solvers import Descent, EqualityConstrained, FromScratch, LayerProblem
from cakeflow.targets import TargetSearch

CONTEXTS = Contexts((("{}",), ("I am. {}", "The sky is. {}")))
SHORT = EditRequest("{} plays", "A", "tennis")
WEAK = GradientSearch(steps=2, lr=1e-3)
SEARCH = GradientSearch(steps=40, lr=0.1, clamp=5.0, essence=None, decay=None)


def strong(lm, requests, folder, **changes):
    """Edits that take mostly, on second moments of 0."""
    width = lm.key_width(Site(0, "mlp_out"))
    moments = dict.fromkeys(LAYERS, torch.zeros(width, width, dtype=torch.float64))
    editor = editor_of(lm, **{"targets": SEARCH, "moments": moments, "solver": LeastSquares(1.0), **changes})
    editor.fit(requests, evaluate=False, run_dir=folder)
    return editor


def arg_max(lm, request):
    """Whether every token of the target is the most likely one, by one full pass."""
    row = encode_batch(lm, [request], Contexts()).rows[0][0]
    logits = lm.model(torch.tensor([row.ids])).logits[0]
    return logits[row.target - 1 : -1].argmax(-1).tolist() == list(row.ids[row.target :])


def test_shares_use_the_weights_of_the_edited_layers_only(lm, requests):
    module = module_of(lm, layers=[1, 2, 4], weighter=Uniform())
    facts = choose_tokens(lm, module.encode(requests[:2]), "auto", 1)
    module.footprints[facts.numbers] = module.estimate(facts.texts)
    module.log = lambda *_, **__: None
    walk = Walk(module, facts, EditStep(()))
    walk.weights = torch.tensor([1.0, 0.0, 3.0])
    contexts = list(walk.contexts([0, 1]))
    assert [context.site.layer for context in contexts] == [1, 4]
    assert [context.index for context in contexts] == [0, 1]
    assert all(context.value_site == Site(4) for context in contexts)
    assert contexts[0].weights.tolist() == [1.0, 3.0]
    walk.weights = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert [context.site.layer for context in walk.contexts([0, 1])] == [1, 2]
    assert [context.site.layer for context in walk.contexts([1])] == [2]


@pytest.fixture
def massive(sharp):
    """The same with a massive activation at the first position."""
    with torch.no_grad():
        sharp.model.transformer.wpe.weight[0] *= 200
    return sharp


def test_facts_that_did_not_take_are_walked_again(sharp, learnable, tmp_path):
    """They take in a further round, in the same batch, and every outcome is what a full pass says."""
    other, requests = copy.deepcopy(sharp), learnable
    once = strong(sharp, requests, tmp_path / "once").module.journal[0]
    again = strong(other, requests, tmp_path / "again", rounds=2).module.journal[0]
    assert 0 < sum(fact.taken for fact in once.facts) < len(requests)
    assert all(fact.taken for fact in again.facts)
    for lm, step in ((sharp, once), (other, again)):
        assert [fact.taken for fact in step.facts] == [arg_max(lm, request) for request in requests]
    assert {fact.walks for fact in once.facts} == {1}
    assert all(fact.walks > 1 for fact, before in zip(again.facts, once.facts, strict=True) if not before.taken)
    assert len(again.changes) > len(once.changes) == len(LAYERS)


def test_a_batch_of_rounds_is_one_batch(sharp, learnable, tmp_path):
    """Replay, rollback and the keys of later batches know nothing of its rounds."""
    before, requests = bits(sharp), learnable
    other = copy.deepcopy(sharp)
    editor = strong(sharp, requests, tmp_path / "run", rounds=2)
    for layer in LAYERS:
        history = editor.module.journal.history(name_of(sharp, layer))
        assert (len(history), len(history.batches)) == (len(requests), 1)
    edited, again = bits(sharp), editor_of(other)
    again.load(tmp_path / "run")
    assert same(other, edited)
    assert [vars(fact) for fact in again.module.journal[0].facts] == [vars(f) for f in editor.module.journal[0].facts]
    editor.rollback(1)
    assert same(sharp, before)


def test_a_fact_that_did_not_take_is_named_with_its_reason(sharp, requests, tmp_path):
    with pytest.warns(NotTakenWarning, match=r"request 0 .*, request 1 .*not taken .*: the search did not make"):
        step = strong(sharp, requests[:2], tmp_path / "a", targets=WEAK).module.journal[0]
    assert [fact.reason for fact in step.facts] == ["search", "search"]
    with pytest.warns(NotTakenWarning, match="too little of the searched change arrived"):
        step = strong(sharp, requests[2:4], tmp_path / "b", solver=LeastSquares(1e4)).module.journal[-1]
    assert [fact.reason for fact in step.facts] == ["arrival", "arrival"]


def test_a_fact_that_takes_alone_and_not_among_others_fails_by_interference(sharp, learnable, tmp_path):
    models = [copy.deepcopy(sharp) for _ in learnable]
    facts = strong(sharp, learnable, tmp_path / "together").module.journal[0].facts
    failing = [i for i, fact in enumerate(facts) if not fact.taken]
    assert {facts[i].reason for i in failing} == {"interference"}
    for i in failing:
        (alone,) = strong(models[i], [learnable[i]], tmp_path / f"alone{i}").module.journal[0].facts
        assert (alone.taken, alone.reason) == (True, "")


def test_a_fact_without_a_free_token_fails_for_that_reason_whatever_its_search_says(massive, tmp_path):
    with pytest.warns(NotTakenWarning), pytest.warns(BlockedWarning):
        editor = strong(massive, [EditRequest("{}", "I", "tennis"), SHORT], tmp_path / "run", targets=WEAK)
    assert [fact.reason for fact in editor.module.journal[0].facts] == ["blocked", "search"]


def test_rounds_need_target_values(lm):
    with pytest.raises(ConfigError, match="rounds must be 0 for a solver without target values; got 1"):
        module_of(lm, rounds=1, solver=Descent())
    for rounds in (-1, 1.5, True, "2"):
        with pytest.raises(ConfigError, match=f"rounds must be a whole number of at least 0, got {rounds!r}"):
            module_of(lm, rounds=rounds)


def test_a_blocked_fact_has_two_entries_and_is_one_fact(massive, requests, tmp_path):
    facts = [requests[0], SHORT, requests[1]]
    editor = strong(massive, facts, tmp_path / "run", contexts=CONTEXTS)
    step = editor.module.journal[0]
    assert step.owners == [0, 1, 1, 2]
    assert len(step.facts) == len(step.requests) == 3
    assert len(step.targets) == 4
    assert step.facts[1].taken == arg_max(massive, SHORT)
    history = editor.module.journal.history(name_of(massive, LAYERS[0]))
    assert history.facts == [step.hashes[i] for i in step.owners]
    assert len(history.without([step.hashes[1]])) == 2
    assert [len(edit.targets) for edit in RunFolder.read(tmp_path / "run").edits] == [1, 2, 1]


def test_a_fact_without_a_free_token_is_named_before_the_search(massive, tmp_path):
    with pytest.warns(BlockedWarning, match=r"request 0 \('I'\): blocked: .* \(its norm is up to \d+ times the median"):
        strong(massive, [EditRequest("{}", "I", "tennis"), SHORT], tmp_path / "run")


def test_facts_that_are_edited_again_take(sharp, learnable, tmp_path):
    """Their keys are in the history with the value of before, which is not preserved against the new one."""
    editor = strong(sharp, learnable[:4], tmp_path / "first", rounds=2)
    second = [
        replace(fact, target_new=word) for fact, word in zip(learnable[:4], ("in", "the", "Paris", "Rome"), strict=True)
    ]
    editor.fit(second, evaluate=False, run_dir=tmp_path / "second")
    outcomes = editor.module.journal[1].facts
    assert [fact.taken for fact in outcomes] == [True] * 4
    assert {fact.walks for fact in outcomes} == {1}  # all of the change arrives in the first walk
    assert min(fact.arrived for fact in outcomes) > 0.8
    assert [arg_max(sharp, request) for request in second] == [True] * 4


def test_another_fact_of_an_earlier_key_takes_its_place_and_that_is_said(sharp, learnable, tmp_path):
    """The prompts are the same up to the end of the subject, so there is one key for both facts."""
    first = replace(learnable[0], prompt="{} is located in", fact_token="subject_last")
    other = replace(first, prompt="{} is known as the", target_new="Rome")
    editor = strong(sharp, [first], tmp_path / "first")
    with pytest.warns(SharedKeyWarning, match=r"their keys are those of earlier facts, whose values they replace: '"):
        editor.fit([other], evaluate=False, run_dir=tmp_path / "second")
    (fact,) = editor.module.journal[1].facts
    assert fact.arrived > 0.8


@dataclass(frozen=True)
class FailsLater(TargetSearch):
    """A search that fails when it is asked for some facts of the batch only."""

    inner: TargetSearch = SEARCH
    size: int = 0

    def search(self, lm, batch, layer, **options):
        if len(batch) < self.size:
            raise NumericalError("the search failed")
        return self.inner.search(lm, batch, layer, **options)

    def measure(self, lm, batch, layer, *, max_tokens=None):
        return self.inner.measure(lm, batch, layer, max_tokens=max_tokens)


@pytest.mark.parametrize("failing", ["search", "limit"])
def test_a_further_walk_that_fails_is_taken_back_alone(sharp, learnable, tmp_path, monkeypatch, failing):
    other = copy.deepcopy(sharp)
    once = strong(sharp, learnable, tmp_path / "once").module.journal[0]
    assert not all(fact.taken for fact in once.facts)
    search = FailsLater(size=len(learnable))
    if failing == "limit":
        search, apply, count = SEARCH, Journal.apply, []

        def apply_some(*arguments):
            count.append(apply(*arguments))
            if len(count) == len(LAYERS) + 1:  # the first change of the further walk has been made
                raise NumericalError("the update is too large")

        monkeypatch.setattr(Journal, "apply", apply_some)
    with pytest.warns(NotTakenWarning, match="a further walk was taken back, the batch stays: "):
        again = strong(other, learnable, tmp_path / "again", rounds=2, targets=search).module.journal[0]
    assert same(other, bits(sharp))
    assert [vars(fact) for fact in again.facts] == [vars(fact) for fact in once.facts]
    assert [vars(each) for each in again.targets] == [vars(each) for each in once.targets]
    assert len(again.changes) == len(once.changes)


def test_facts_that_the_model_states_are_those_that_it_states_now(sharp, learnable, tmp_path):
    """An earlier edit counts, and one that was taken back does not."""
    editor = strong(sharp, learnable[:1], tmp_path / "first", rounds=2)
    assert arg_max(sharp, learnable[0])
    with pytest.warns(RequestWarning, match=r"gives already, before any edit: 1 \(numbered .*, 1 of 2; there is"):
        editor.fit([learnable[1], learnable[0]], evaluate=False, run_dir=tmp_path / "second")
    editor.rollback()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RequestWarning)
        editor.fit(learnable[:1], evaluate=False, run_dir=tmp_path / "third")


CHAT = "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}\n{% endfor %}"


def test_a_fact_arrives_in_a_chat_as_outside(tiny, requests, tmp_path):
    tiny.tokenizer.chat_template = CHAT
    width = tiny.key_width(Site(0, "mlp_out"))
    moments = {3: torch.zeros(width, width, dtype=torch.float64)}
    contexts = Contexts(chats=(tiny.user_turn("{}"),))
    parts = {"layers": [3], "moments": moments, "solver": LeastSquares(1e-8), "targets": SEARCH, "contexts": contexts}
    editor = editor_of(tiny, chat=True, **parts)
    editor.fit(requests[:3], evaluate=False, run_dir=tmp_path / "run")
    (step,) = editor.journal
    assert step.owners == [0, 0, 1, 1, 2, 2]
    assert all(fact.arrived > 0.99 for fact in step.facts)
    rows = [row for each in encode_batch(tiny, requests[:3], contexts).rows for row in each]
    after = [output_at(tiny, row) for row in rows]
    with editor.reverted():
        moved = [now - output_at(tiny, row) for now, row in zip(after, rows, strict=True)]
    for outside, inside, value, start in zip(moved[::2], moved[1::2], step.values[3][::2], after[::2], strict=True):
        assert torch.allclose(value, start, rtol=0, atol=0.01 * float(outside.norm()))
        assert torch.allclose(inside, outside, rtol=0, atol=0.01 * float(outside.norm()))


def output_at(lm, row):
    """Output of block 3 at the token of the fact, by one full pass."""
    with torch.no_grad(), capture(lm, [Site(3)]) as outputs:
        lm.model(torch.tensor([row.ids]))
    return outputs[Site(3)][0, row.fact]


def test_without_a_chat_template_there_are_no_chats(lm, requests, tmp_path):
    editor = editor_of(lm, chat=True, contexts=CONTEXTS)
    editor.fit(requests[:2], evaluate=False, run_dir=tmp_path / "run")
    assert editor.journal[0].owners == [0, 1]
    assert editor.module.contexts == CONTEXTS


def test_named_chats_are_taken_as_they_are(lm, requests, tmp_path):
    lm.tokenizer.chat_template = CHAT
    named = replace(CONTEXTS, chats=("Q: {} A:",))
    editor = editor_of(lm, chat=True, contexts=named)
    editor.fit(requests[:2], evaluate=False, run_dir=tmp_path / "run")
    assert editor.module.contexts == named
    assert editor.journal[0].owners == [0, 0, 1, 1]


def test_a_fact_that_did_not_take_in_a_chat_is_walked_again_with_both_keys(lm, requests):
    """What takes is asked of the model itself: here, on the prompts as they are, and in a chat."""
    lm.tokenizer.chat_template = CHAT
    module = module_of(lm, layers=[1, 2], chat=True, contexts=CONTEXTS)
    texts = module.encode(requests[:3])
    facts = choose_tokens(lm, texts, "auto", 1, keys=module.contexts.keys)
    module.footprints[facts.numbers] = module.estimate(facts.texts)
    module.log = lambda *_, **__: None
    walk = Walk(module, facts, EditStep(()))
    module.phase = lambda _: nullcontext()
    walk.probability, walk.taken, walk.entries_taken = walk.ask()
    for i, rows in enumerate(facts.texts.rows):
        with torch.no_grad():
            logits = lm.model(torch.tensor([rows[0].ids])).logits[0]
        expected = logits[rows[0].target - 1 : -1].argmax(-1).tolist() == list(rows[0].ids[rows[0].target :])
        assert bool(walk.entries_taken[i]) == expected
    walk.taken[:], walk.entries_taken[:] = True, True
    assert walk.not_taken() == []
    walk.entries_taken[3] = False
    assert walk.not_taken() == [2, 3]
    walk.taken[0] = False
    assert walk.not_taken() == [0, 1, 2, 3]


def test_forward_targets_are_the_first_layers_carried_to_those_above(lm, requests, tmp_path):
    allocator = Sequential(power=0, residual_at="forward")
    unedited, facts = copy.deepcopy(lm), requests[:3]
    editor = strong(lm, facts, tmp_path / "run", allocator=allocator, solver=EqualityConstrained(LeastSquares(1e-6)))
    step = editor.journal[0]
    search = SEARCH.search(unedited, encode_batch(unedited, facts, Contexts()), LAYERS[0])
    torch.testing.assert_close(step.values[LAYERS[0]], search.values, rtol=1e-6, atol=1e-6)
    rows = [rows[0].ids[: rows[0].fact + 1] for rows in encode_batch(unedited, facts, Contexts()).rows]
    carried = PromptStream(unedited, rows).carry(Site(LAYERS[0]), search.values, [Site(LAYERS[1])])
    torch.testing.assert_close(step.values[LAYERS[1]], carried[Site(LAYERS[1])], rtol=1e-6, atol=1e-6)
    assert [each.steps for each in step.targets if each.layer == LAYERS[1]] == [0, 0, 0]
    # every layer takes all that is missing there, so that one key per fact leaves nothing
    assert min(each.arrived for each in step.facts) > 1 - 1e-6


def test_values_are_noted_beside_keys_and_a_stream_from_scratch_is_one_batch(lm, requests, tmp_path):
    """At the first layer, whose keys stay what they are."""
    original, unedited = lm.oriented(Site(LAYERS[0], "mlp_out")).clone(), copy.deepcopy(lm)
    editor = editor_of(lm, solver=FromScratch(LeastSquares(1.0)))
    editor.fit(requests[:5], 2, evaluate=False, run_dir=tmp_path / "run")
    module, name = editor.module, name_of(lm, LAYERS[0])
    history = editor.journal.history(name)
    assert history.values.shape == (5, lm.width)
    problem = LayerProblem(
        history.keys, history.values - history.keys @ original.T, original, original, module.covariances[LAYERS[0]]
    )
    once = original + LeastSquares(1.0).solve(problem).dense
    torch.testing.assert_close(lm.oriented(Site(LAYERS[0], "mlp_out")), once, rtol=0, atol=1e-9)
    again = editor_of(unedited, solver=FromScratch(LeastSquares(1.0)))
    again.load(tmp_path / "run")
    assert torch.equal(again.journal.history(name).values, history.values)
    again.undo(requests[1].subject)
    assert torch.equal(again.journal.history(name).values, history.values[[0, 2, 3, 4]])


def one_solve(editor, layer, original, facts):
    """The weight for the keys and values of some facts, (step, row), as they were recorded; by the dense formula."""
    name, covariance = name_of(editor.module.lm, layer), editor.module.covariances[layer]
    own = [next(p.change for p in editor.journal[step].changes if p.place == name) for step, _ in facts]
    keys = torch.stack([change.keys[row] for change, (_, row) in zip(own, facts, strict=True)])
    values = torch.stack([change.values[row] for change, (_, row) in zip(own, facts, strict=True)])
    system = covariance.weight * covariance.moment + torch.eye(len(covariance)).double() + keys.T @ keys
    return original + (values - keys @ original.T).T @ keys @ torch.linalg.inv(system)


@pytest.mark.parametrize("end", ["", "load", "rollback", "undo"])
def test_a_stream_from_scratch_is_one_solve_of_the_facts_in_force_with_their_newest_values(lm, requests, tmp_path, end):
    """The second batch's first fact has the key of the first batch's; without it, that one is in force again."""
    originals, unedited = {layer: lm.oriented(Site(layer, "mlp_out")).clone() for layer in LAYERS}, copy.deepcopy(lm)
    solver, other = FromScratch(LeastSquares(1.0)), replace(requests[0], prompt="{} is known as", target_new="Lisbon")
    editor = editor_of(lm, solver=solver)
    editor.fit(requests[:2], evaluate=False, run_dir=tmp_path / "0")
    with pytest.warns(SharedKeyWarning, match="whose values they replace"):
        editor.fit([other, requests[2]], evaluate=False, run_dir=tmp_path / "1")
    assert editor.journal[1].replaced == {editor.journal[1].hashes[0]: [editor.journal[0].hashes[0]]}
    if end == "load":
        editor = editor_of(unedited, solver=solver)
        editor.load(tmp_path / "1")
    editor.fit(requests[3:5], evaluate=False, run_dir=tmp_path / "2")
    facts = [(0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    if end == "rollback":
        editor.rollback(batch=1)
        facts = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    elif end == "undo":
        editor.undo(other.text)
        facts = [(0, 0), (0, 1), (1, 1), (2, 0), (2, 1), (4, 0)]
    if end in ("rollback", "undo"):
        editor.fit(requests[5:6], evaluate=False, run_dir=tmp_path / "3")
    assert editor.journal.edits == len(facts)
    for layer, original in originals.items():
        weight = editor.module.lm.oriented(Site(layer, "mlp_out"))
        torch.testing.assert_close(weight, one_solve(editor, layer, original, facts), rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore::cakeflow.errors.RequestWarning")
@pytest.mark.parametrize("contexts", [Contexts(), CONTEXTS], ids=["one key", "other contexts"])
def test_a_fact_that_is_edited_again_counts_once_in_later_solves(lm, requests, tmp_path, contexts):
    """By any solver, and whatever its key is now."""
    histories, solver = [], LeastSquares(1.0)

    class Watched(LeastSquares):
        def solve(self, problem):
            histories.append(list(problem.history.facts))
            return solver.solve(problem)

    editor = editor_of(lm, solver=Watched(1.0))
    for number, facts in enumerate((requests[:2], requests[:1], requests[2:3])):
        editor.module.contexts = contexts if number == 1 else Contexts()
        editor.fit(facts, evaluate=False, run_dir=tmp_path / str(number))
    first, again, _ = (step.hashes for step in editor.journal)
    assert histories == [[], []] + [[first[1]]] * 2 + [[first[1], again[0]]] * 2
    assert first[0] == again[0]
