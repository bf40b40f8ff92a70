"""Edits that are composed, through the doors of every method: stored, resumed, undone one by one, exported."""

import copy
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cakeflow_sidememory import ComposedProjection, FactorMemory, FactorTraining, Retrieval, SideMemory
from cakeflow_sidememory.factor_memory import question_number
from stops import STOPS
from test_cakeflow_sidememory import QUIET, equal, hashes, logits, tree

from cakeflow import Editor, EditRequest
from cakeflow.callbacks import Policy, PolicyGuard
from cakeflow.core import build_module
from cakeflow.errors import (
    ArchitectureError,
    ConfigError,
    ExportError,
    PolicyError,
    RequestError,
    RequestWarning,
    ResumeError,
)
from cakeflow.evaluation import score_targets
from cakeflow.export import apply_memory
from cakeflow.journal import replay, verify
from cakeflow.models import Site, load_model

pytestmark = pytest.mark.filterwarnings("ignore:.* contradict an earlier one")
"""Two answers of one question look like a contradiction."""
FACTS = [
    EditRequest("The first letter of {}", "Lund", "a", "the"),
    EditRequest("The first letter of {}", "Lund", "of", "the", relation="another answer"),
    EditRequest("In the town of {}", "Rome", "in", "of"),
    EditRequest("In music, a {}", "violin", "the", "a"),
]
"""Two batches of two; the first two are answers of one question."""
UNRELATED = ["She walked along the river", "of the"]
TEXTS = [fact.text for fact in FACTS] + UNRELATED
SHORT = FactorTraining(steps=30, lr=0.05, share=0.5, select="highest", last=0.0)


def role(lm):
    names = dict(lm.module(Site(5)).named_modules())
    return "mlp.up_proj" if "mlp.up_proj" in names else "mlp.c_fc"


def memory_of(lm, **settings):
    plain = {"role": role(lm), "similarity_layer": 1, "training": SHORT, "retrieval": Retrieval(0.95)}
    return FactorMemory(lm, **{**plain, **settings})


def editor_of(lm, **trainer):
    return Editor(memory_of(lm), {**QUIET, **trainer})


def place(lm):
    return lm.architecture.path(Site(5, role(lm)))


def own_hashes(lm):
    """Hashes of the tensors that the unedited model has, by the names that they have there."""
    path, every = place(lm), hashes(lm)
    if isinstance(lm.module(path), ComposedProjection):
        every = {name: each for name, each in every.items() if not name.startswith(f"{path}.") or ".base." in name}
    return {name.replace(f"{path}.base.", f"{path}."): each for name, each in every.items()}


def first(lm, facts):
    """Probability of each new target."""
    return score_targets(lm, [fact.text for fact in facts], [fact.target_new for fact in facts])[0].exp()


def stated(lm):
    """Whether the third fact's first token is the likeliest."""
    ids = torch.tensor([lm.tokenizer(FACTS[2].text)["input_ids"]])
    return int(lm(input_ids=ids).logits[0, -1].argmax()) == lm.tokenizer(" in")["input_ids"][0]


@pytest.fixture
def run(lm, tmp_path):
    """The tiny GPT-2 after two batches, and its run folder."""
    editor = editor_of(lm)
    editor.fit(FACTS, 2, run_dir=tmp_path / "run")
    return editor, tmp_path / "run"


def test_edits_take_beside_the_weights(tiny, tmp_path):
    before, unedited, during = hashes(tiny), logits(tiny, UNRELATED), []
    chance, facts = first(tiny, FACTS[1:]), FACTS[1:]
    editor = editor_of(tiny)
    edit = editor.module.edit
    editor.module.edit = lambda *args: (edit(*args), during.append(own_hashes(tiny)))[0]
    result = editor.fit(facts, 2, run_dir=tmp_path / "run")
    assert (first(tiny, facts) > 5 * chance).all()
    assert result.after["efficacy_exact"] > result.before["efficacy_exact"]
    assert equal(logits(tiny, UNRELATED), unedited)
    assert during == [before] * 2
    assert own_hashes(tiny) == before
    assert not verify(tmp_path / "run").faults
    assert set(editor.journal[0].numbers) == {f"memory/{name}" for name in ("likelihood", "others", "last", "total")}
    with editor.reverted():
        assert hashes(tiny) == before
        assert tiny.fingerprint() == editor.journal.base.fingerprint
    assert (first(tiny, facts) > 5 * chance).all()


def test_rollback_gives_the_very_modules_back(tiny, tmp_path):
    before, modules, unedited = hashes(tiny), tree(tiny), logits(tiny, TEXTS)
    editor = editor_of(tiny)
    editor.fit(FACTS, 2, run_dir=tmp_path / "run")
    edited = logits(tiny, TEXTS)
    editor.rollback(1)
    assert len(editor.module.memory()) == 2
    assert not equal(logits(tiny, TEXTS), edited)
    editor.rollback()
    assert (hashes(tiny), tree(tiny)) == (before, modules)
    assert equal(logits(tiny, TEXTS), unedited)
    assert tiny.scope is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.model.modules())
    assert not verify(tmp_path / "run").faults
    with pytest.raises(ConfigError, match="has no edits beside it; edit some facts first"):
        editor.module.memory()


def test_a_batch_below_a_later_one_comes_back_alone(tiny, tmp_path):
    """What is left is what the other batch alone would have made, bit for bit."""
    other = copy.deepcopy(tiny)
    editor = editor_of(tiny)
    editor.fit(FACTS, 2, run_dir=tmp_path / "run")
    editor.rollback(batch=0)
    assert editor.module.memory().facts.tolist() == [question_number(fact) for fact in FACTS[2:]]
    assert not verify(tmp_path / "run").faults
    alone = editor_of(other, logger=False)
    alone.fit(FACTS[2:], 2, evaluate=False)
    assert hashes(tiny) == hashes(other)


def test_neither_order_nor_batches_matter(tiny):
    other = copy.deepcopy(tiny)
    editor_of(tiny, logger=False).fit(FACTS, 2, evaluate=False)
    editor_of(other, logger=False).fit([FACTS[i] for i in (3, 1, 0, 2)], 1, evaluate=False)
    for one, two in zip(logits(tiny, TEXTS), logits(other, TEXTS), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_a_fact_that_is_edited_again_acts_once(tiny):
    once = copy.deepcopy(tiny)
    editor = editor_of(tiny, logger=False)
    editor.fit(FACTS[2:3], evaluate=False)
    with pytest.warns(RequestWarning, match="gives already, before any edit") if stated(tiny) else nullcontext():
        editor.fit(FACTS[2:3], evaluate=False)
    editor_of(once, logger=False).fit(FACTS[2:3], evaluate=False)
    assert len(editor.module.memory()) == 2
    assert equal(logits(tiny, TEXTS), logits(once, TEXTS))
    editor.rollback(batch=1)
    assert equal(logits(tiny, TEXTS), logits(once, TEXTS))


def test_a_new_answer_of_a_question_takes_the_place_of_the_old_one(tiny):
    new, old_alone, new_alone = replace(FACTS[0], target_new="of"), copy.deepcopy(tiny), copy.deepcopy(tiny)
    editor = editor_of(tiny, logger=False)
    for fact in (FACTS[0], new):
        editor.fit([fact], evaluate=False)
    editor_of(new_alone, logger=False).fit([new], evaluate=False)
    assert equal(logits(tiny, TEXTS), logits(new_alone, TEXTS))
    editor.rollback(batch=1)
    editor_of(old_alone, logger=False).fit(FACTS[:1], evaluate=False)
    assert equal(logits(tiny, TEXTS), logits(old_alone, TEXTS))


def test_a_run_is_replayed_and_goes_on_from_its_folder(workplace):
    editor = editor_of(load_model("model"))
    editor.fit(FACTS[:2], run_dir="run")
    assert hashes(replay(Path("run")).model) == hashes(editor.module.lm)
    further = editor_of(load_model("model"))
    further.load("run")
    further.fit(FACTS[2:], run_dir="second")
    editor.fit(FACTS[2:], run_dir="third")
    assert hashes(further.module.lm) == hashes(editor.module.lm)
    assert hashes(replay(Path("second")).model) == hashes(editor.module.lm)
    assert not verify(Path("second")).faults


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_stops_in_its_second_batch_goes_on(lm, tmp_path, error, ctrl_c):
    whole = copy.deepcopy(lm)
    with STOPS.at(-1, None):
        editor_of(whole).fit(FACTS, 2, evaluate=False, run_dir=tmp_path / "whole")
        moments = list(enumerate(STOPS.seen))
    start = next(number for number, moment in moments if moment[1] == "committed") + 1
    stops = [number for number, moment in moments[start:] if moment[0] == "cakeflow.journal"]
    assert len(stops) == 4
    for stop in stops:
        fresh, folder = copy.deepcopy(lm), tmp_path / str(stop)
        editor = editor_of(fresh)
        with pytest.raises((error, SystemExit)), STOPS.at(stop, error):
            editor.fit(FACTS, 2, evaluate=False, run_dir=folder)
        assert (len(editor.journal), len(editor.module.memory())) == (1, 2)
        fresh = copy.deepcopy(lm)
        editor_of(fresh).fit(FACTS, 2, evaluate=False, run_dir=folder)
        assert hashes(fresh) == hashes(whole)
        assert not verify(folder).faults


def test_a_training_that_fails_leaves_the_earlier_edits_in_place(run, lm, monkeypatch):
    states, modules = hashes(lm), tree(lm)

    def fail(*_, **__):
        assert not isinstance(lm.module(place(lm)), ComposedProjection)
        raise RuntimeError("no power")

    monkeypatch.setattr("cakeflow_sidememory.factor_memory.train_factors", fail)
    with pytest.raises(RuntimeError, match="no power"):
        Editor(run[0].module, {**QUIET, "logger": False}).fit(FACTS[:1], evaluate=False)
    assert (hashes(lm), tree(lm)) == (states, modules)


def test_a_run_with_other_settings_does_not_go_on(lm, tmp_path):
    with pytest.raises(RuntimeError), STOPS.at(30, RuntimeError):
        editor_of(copy.deepcopy(lm)).fit(FACTS, 1, evaluate=False, run_dir=tmp_path)
    with pytest.raises(ResumeError, match=r"settings.retrieval.top was 4, is 3"):
        Editor(memory_of(lm, retrieval=Retrieval(0.95, 3)), QUIET).fit(FACTS, 1, evaluate=False, run_dir=tmp_path)


def test_edits_composed_by_another_rule_are_not_added(run, lm):
    states = hashes(lm)
    other = Editor(memory_of(lm, rule="outermost"), {**QUIET, "logger": False})
    with pytest.raises(ConfigError, match="the edits there are composed by"):
        other.fit(FACTS[:1], evaluate=False)
    assert hashes(lm) == states


# ---- what leaves the process ----


@pytest.mark.parametrize("batch", [None, 0])
def test_an_export_gives_the_same_logits(workplace, batch):
    editor = editor_of(load_model("model"))
    editor.fit(FACTS, 2, evaluate=False, run_dir="run")
    if batch is not None:
        editor.rollback(batch=batch)
    editor.export("memory", "memory")
    fresh = load_model("model")
    manifest = apply_memory(fresh, "memory")
    assert {change.kind for change in manifest.changes} == {"FactorChange"}
    assert hashes(fresh) == hashes(editor.module.lm)
    assert equal(logits(fresh, TEXTS), logits(editor.module.lm, TEXTS))
    further = Editor(memory_of(fresh), {**QUIET, "logger": False})  # edits go on beside those that were applied
    further.fit(FACTS[:1], evaluate=False)
    assert len(further.module.memory()) == len(editor.module.memory()) + 1


def test_a_memory_for_another_model_is_refused(run, lm, tmp_path):
    run[0].export(tmp_path / "memory", "memory")
    run[0].rollback()
    before, weight = hashes(lm), lm.weight(Site(2, "mlp_out"))
    with torch.no_grad():
        weight[0, 0] += 1
    with pytest.raises(ExportError, match="other weights"):
        apply_memory(lm, tmp_path / "memory")
    with torch.no_grad():
        weight[0, 0] -= 1
    assert hashes(lm).keys() == before.keys()
    assert lm.scope is None


@pytest.mark.parametrize("format", ["model", "delta", "lora"])
def test_formats_of_weights_are_refused(run, lm, tmp_path, format):
    with pytest.raises(ExportError, match=f"modules were put in place at {place(lm)}.*export as memory"):
        run[0].export(tmp_path / "export", format)
    assert not (tmp_path / "export").exists()


def test_a_policy_takes_it_back(lm, tmp_path):
    before, modules = hashes(lm), tree(lm)
    editor = editor_of(lm, callbacks=[PolicyGuard(Policy(minimum={"memory/total": 100.0}))])
    with pytest.raises(PolicyError, match="memory/total"):
        editor.fit(FACTS, 2, run_dir=tmp_path / "run")
    assert (hashes(lm), tree(lm)) == (before, modules)


# ---- settings ----


def test_a_config_names_it(workplace):
    Path("method.yaml").write_text(
        "model: {class_path: cakeflow_sidememory.FactorMemory, init_args: {role: mlp.c_fc, similarity_layer: 2, "
        "training: {steps: 2}, retrieval: {top: 2}, base: model}}"
    )
    module = build_module([Path("method.yaml")])
    settings = module.settings()
    assert (settings["training"]["steps"], settings["retrieval"]["top"], settings["rule"]) == (2, 2, "agreeing")
    Editor(module, QUIET).fit(FACTS, 2, evaluate=False, run_dir="run")
    assert len(module.memory()) == 4


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"role": "mlp.up"}, ArchitectureError, r"no module 'transformer\.h\.5\.mlp\.up'"),
        ({"role": "mlp_out"}, ArchitectureError, "name its up projection"),
        ({"similarity_layer": 5}, ConfigError, "similarity_layer=5 must be a block before"),
        ({"similarity_layer": -1}, ConfigError, "similarity_layer=-1 must be a block before"),
        ({"training": FactorTraining(share=1e-6)}, ConfigError, "share=1e-06 of 192 neurons is 0"),
    ],
)
def test_bad_settings_are_refused_before_anything_changes(lm, settings, error, message):
    before = hashes(lm)
    with pytest.raises(error, match=message):
        Editor(memory_of(lm, **settings), {**QUIET, "logger": False}).fit(FACTS, 2, evaluate=False)
    assert hashes(lm) == before
    assert lm.scope is None


def test_an_unknown_rule_and_unreadable_facts_are_refused(lm):
    with pytest.raises(ConfigError, match="rule must be one of agreeing, outermost"):
        memory_of(lm, rule="sum")
    with pytest.raises(RequestError, match="target_new"):
        editor_of(lm, logger=False).fit([FACTS[0], EditRequest("The {}", "Lund", "\u200b")], evaluate=False)
    assert lm.scope is None


def test_a_side_memory_at_the_same_projection_is_refused(run, lm):
    states = hashes(lm)
    other = Editor(SideMemory(lm, layer=5, role=role(lm)), {**QUIET, "logger": False})
    with pytest.raises((ArchitectureError, ConfigError)):
        other.fit(FACTS[:1], evaluate=False)
    assert hashes(lm) == states
