"""Runs with a codebook: edits take, batches depend on no other, and what leaves the process comes back to the bit."""

import copy
from pathlib import Path

import pytest
import torch
from cakeflow_sidememory import Codebook, CodebookChange, CodebookMemory, CodebookSettings, ValueTraining
from hypothesis import given, settings
from hypothesis import strategies as st

from cakeflow import Editor, EditRequest
from cakeflow.errors import ConfigError, ExportError, LedgerError, ShapeError
from cakeflow.evaluation import score_targets
from cakeflow.export import apply_memory
from cakeflow.journal import replay, verify
from cakeflow.models import Site, load_model
from cakeflow.storage import tensor_hash

SITE = Site(3, "mlp_out")
FACTS = [
    EditRequest("The first letter of {}", subject, new, true)
    for subject, new, true in (
        ("Lund", "a", "the"), ("Australia", "the", "a"), ("Old Malmö", "of", "in"), ("Rome", "in", "of"),
    )
]  # fmt: skip
QUIET = {"enable_progress_bar": False, "accelerator": "cpu"}
UNRELATED = ["She walked along the river", "In music, a violin has four strings"]


def editor_of(lm, eps=1e-3, **parts):
    plain = {"codebook": CodebookSettings(eps), "training": ValueTraining(lr=0.3, steps=25)}
    return Editor(CodebookMemory(lm, 3, **{**plain, **parts}), QUIET)


def hashes(lm):
    return {name: tensor_hash(tensor) for name, tensor in lm.model.state_dict().items()}


def logits(lm, texts):
    with torch.no_grad():
        return [lm(input_ids=torch.tensor([lm.tokenizer(text)["input_ids"]])).logits for text in texts]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_edits_take_and_nothing_else_moves(tiny, tmp_path):
    before, unedited = hashes(tiny), logits(tiny, UNRELATED)
    editor = editor_of(tiny)
    result = editor.fit(FACTS, 2, run_dir=tmp_path / "run")
    assert (result.before["efficacy_exact"], result.after["efficacy_exact"]) == (0, 1)
    assert equal(logits(tiny, UNRELATED), unedited)
    assert result.logged["memory/balls"] == 4
    assert result.protocol == "clean-v2"
    assert not verify(tmp_path / "run").faults
    editor.rollback()
    assert hashes(tiny) == before
    assert not tiny.model._forward_pre_hooks


def test_a_wide_ball_is_split_by_the_next_fact(lm):
    """With balls that reach all prompts, every fact still answers for itself."""
    editor = editor_of(lm, eps=1e4)
    editor.fit(FACTS, 1, evaluate=False)
    assert len(set(lm.module(SITE).radius.tolist())) > 1
    hits = score_targets(lm, [fact.text for fact in FACTS], [fact.target_new for fact in FACTS])[1]
    assert hits.tolist() == [1] * 4


@pytest.mark.parametrize("eps", [1e-3, 1e4])
def test_a_batch_that_is_taken_back_alone_was_never_there(lm, tmp_path, eps):
    other = editor_of(copy.deepcopy(lm), eps=eps)
    other.fit([FACTS[0], *FACTS[2:]], 1, evaluate=False)
    editor = editor_of(lm, eps=eps)
    editor.fit(FACTS, 1, evaluate=False, run_dir=tmp_path / "run")
    editor.rollback(batch=1)
    assert hashes(lm) == hashes(other.module.lm)
    assert not verify(tmp_path / "run").faults


@pytest.fixture(scope="module")
def changes(_models):
    """The change of each fact alone, and the unedited projection."""
    lm, result = copy.deepcopy(_models["gpt2"]), []
    for fact in [*FACTS, EditRequest("The first letter of {}", "Rome", "a")]:
        editor = editor_of(copy.deepcopy(lm))
        editor.fit([fact], evaluate=False)
        result += editor.journal.changes
    return lm.module(SITE), result


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=7), st.sampled_from([1e-3, 0.5, 2.0, 1e4]), st.data())
def test_facts_in_batches_of_any_size_give_one_codebook(changes, order, eps, data):
    base, alone = changes
    by_one, cut = base, data.draw(st.integers(0, len(order)))
    parts = [alone[place] for place in order]
    for part in parts:
        by_one = CodebookChange("x", eps, part.keys, part.values, part.labels).build(by_one)
    module = base
    for group in (parts[:cut], parts[cut:]):
        if group:
            columns = [torch.cat([getattr(each, name) for each in group]) for name in ("keys", "values")]
            module = CodebookChange("x", eps, *columns, tuple(label for each in group for label in each.labels)).build(
                module
            )
    one, other = by_one.state_dict(), module.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_is_replayed_exported_and_gone_on_with(workplace):
    editor = editor_of(load_model("model"))
    editor.fit(FACTS[:2], run_dir="run")
    assert hashes(replay(Path("run")).model) == hashes(editor.module.lm)
    editor.export("memory", "memory")
    fresh = load_model("model")
    apply_memory(fresh, "memory")
    assert hashes(fresh) == hashes(editor.module.lm)
    with pytest.raises(ExportError, match="export as memory"):
        editor.save_pretrained("whole")
    further = editor_of(load_model("model"))
    further.load("run")
    further.fit(FACTS[2:], run_dir="second")
    editor.fit(FACTS[2:], run_dir="third")
    assert hashes(further.module.lm) == hashes(editor.module.lm)


def test_a_later_fact_about_the_same_prompt_wins(lm):
    facts = [FACTS[0], EditRequest("The first letter of {}", "Lund", "of")]
    editor = editor_of(lm)
    for fact in facts:
        editor.fit([fact], evaluate=False)
    assert score_targets(lm, [facts[0].text] * 2, ["a", "of"])[1].tolist() == [0, 1]
    assert lm.module(SITE).owner.tolist() == [-1, 1]


def test_damaged_and_foreign_changes_are_refused(lm):
    editor = editor_of(lm)
    editor.fit(FACTS[:2], evaluate=False)
    (change,) = editor.journal.changes
    tensors = change.tensors()
    again = CodebookChange.from_tensors(change.place, tensors)
    assert (again.eps, again.labels) == (change.eps, change.labels)
    for name, damaged in (
        ("eps", torch.tensor([float("nan")])), ("eps", torch.empty(0)), ("eps", torch.tensor([-1.0])),
        ("values", change.values[:1]),
    ):  # fmt: skip
        with pytest.raises(LedgerError, match=f"the codebook at {change.place} has the radius"):
            CodebookChange.from_tensors(change.place, {**tensors, name: damaged})
    for name in ("keys", "values"):  # they are buffers, which nobody looks at when a module is put in place
        with pytest.raises(LedgerError, match=f"{name} are not finite numbers"):
            CodebookChange.from_tensors(change.place, {**tensors, name: tensors[name] * torch.nan})
    with pytest.raises(LedgerError, match="labels are not whole numbers"):
        CodebookChange.from_tensors(change.place, {**tensors, "labels": tensors["labels"].double()})
    with pytest.raises(ShapeError, match="belongs to the model that it was made for"):
        change.build(torch.nn.Linear(3, 3))
    with pytest.raises(ConfigError, match=r"the codebook there has the settings .*eps=0.001.*not .*eps=5.0"):
        editor_of(lm, eps=5.0).fit(FACTS[2:], evaluate=False)
    assert isinstance(lm.module(SITE), Codebook)


def test_a_ball_reaches_the_key_that_it_grew_to():
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        first, step = torch.randn(2, 24, generator=generator)
        keys = torch.stack([first, first + 1.7 * step / step.norm()])
        module = CodebookChange("x", 1.0, keys, torch.zeros(2, 8), ((1,), (1,))).build(torch.nn.Linear(24, 8))
        assert module.decide(keys).tolist() == [1, 2]


def test_settings(lm):
    named = editor_of(lm, oracle=True).module.settings()
    assert (named["layer"], named["codebook"], named["oracle"]) == (3, {"eps": 1e-3}, True)
    assert named["training"] == {"lr": 0.3, "steps": 25, "enough": 0.0}


def test_a_ball_has_an_end():
    with pytest.raises(ConfigError, match=r"eps is infinite"):
        CodebookSettings(float("inf"))


@pytest.mark.filterwarnings("ignore:records that repeat an earlier one")
def test_a_fact_that_is_learned_again_answers_by_its_last_entry(lm):
    editor = editor_of(lm)
    editor.fit([FACTS[0], FACTS[1], FACTS[0]], 1, evaluate=False)
    assert [(row.decision, row.own) for row in editor.module.routes(FACTS[:2])] == [(3, 3), (2, 2)]
    editor.rollback(1)
    assert [(row.decision, row.own) for row in editor.module.routes(FACTS[:2])] == [(1, 1), (2, 2)]
