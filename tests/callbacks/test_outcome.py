"""Every run says what became of it, and what it cost."""

import copy
import json
from dataclasses import replace

import lightning as L
import pytest
import torch
from tiny_runs import editor_of, module_of

from cakeflow import EditDataModule, Editor, GradientSearch, LeastSquares
from cakeflow.callbacks import NeutralText, OutcomeCheck, Policy, PolicyGuard
from cakeflow.data import builtin_facts, states
from cakeflow.errors import ConfigError, PolicyError, SideEffectWarning
from cakeflow.evaluation.outcome import ask
from cakeflow.journal.schema import FreeAnswer
from cakeflow.models import Site

pytestmark = pytest.mark.checks
FACTS = builtin_facts()[:4]
STRONG = {"targets": GradientSearch(steps=12, lr=0.5), "rounds": 2, "solver": LeastSquares(0.01)}


def ruinous_editor(lm, trainer=None):
    """Nothing holds the change back: neither second moments, nor a ridge, nor a bound; the model is sure of itself."""
    lm.model.transformer.ln_f.weight.data *= 20
    width = lm.key_width(Site(0, "mlp_out"))
    moments = dict.fromkeys([1, 3], 1e-9 * torch.eye(width, dtype=torch.float64))
    targets = GradientSearch(steps=3, lr=100.0, clamp=1000.0)
    return editor_of(lm, trainer, max_relative_update=1e9, moments=moments, targets=targets, solver=LeastSquares(1e-9))


def answers(folder):
    lines = (folder / "answers.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return [FreeAnswer.model_validate(json.loads(line)) for line in lines]


def test_a_run_asks_every_fact_before_and_after(tiny, tmp_path):
    tiny.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    editor = editor_of(tiny, **STRONG)
    run = editor.fit(FACTS, run_dir=tmp_path / "run")
    facts = run.outcome.of("fact")
    assert [(each.form, each.request) for each in facts] == [(f, i) for f in ("completion", "chat") for i in range(4)]
    assert [each.after for each in facts] == ask(tiny, facts)
    with editor.reverted():
        assert [each.before for each in facts] == ask(tiny, facts)
    assert list(run.outcome.answers) == answers(tmp_path / "run")
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["verdict"] == run.outcome.verdict
    assert run.after["learned"] == 1 - len(run.outcome.failed) / 4
    assert {"learned", "learned_chat", "neighbors"} <= {*run.before} & {*run.after}
    assert run.before["neighbors"] == 1.0
    assert "neutral/kl" in run.logged


def test_a_plain_trainer_compares_with_the_unedited_model_too(tiny):
    whole = editor_of(copy.deepcopy(tiny), **STRONG).fit(FACTS, evaluate=True)
    module = module_of(tiny, **STRONG)
    options = {"max_epochs": 1, "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    L.Trainer(**options, callbacks=[OutcomeCheck()]).fit(module, datamodule=EditDataModule(FACTS))
    assert [each.before for each in module.outcome.answers] == [each.before for each in whole.outcome.answers]
    assert any(each.before != each.after for each in module.outcome.answers)


def test_no_metric_is_nan_where_only_prompt_subject_and_target_are_there(lm, tmp_path):
    bare = [replace(fact, target_true=None, probes=(), reference=None) for fact in FACTS]
    run = editor_of(lm).fit(bare, run_dir=tmp_path / "run")
    assert all(value == value for side in (run.before, run.after) for value in side.values())
    assert "efficacy" not in run.after
    assert {"efficacy_exact", "learned"} <= {*run.after}


def test_without_evaluation_nothing_is_asked(lm, tmp_path):
    run = editor_of(lm).fit(FACTS, run_dir=tmp_path / "run", evaluate=False)
    assert run.outcome is None
    assert not (tmp_path / "run" / "answers.jsonl").exists()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["verdict"] == ""


def test_a_second_run_is_compared_with_the_model_before_it_and_with_the_unedited_one(lm):
    editor = editor_of(lm, **STRONG)
    first = editor.fit(FACTS[:2])
    second = editor.fit(FACTS[2:])
    neighbors = second.outcome.of("neighbor")
    with editor.reverted():
        unedited = ask(lm, neighbors)
    editor.rollback(1)
    assert [each.before for each in neighbors] == ask(lm, neighbors)
    editor.rollback()
    assert [each.before for each in first.outcome.of("fact")] == ask(lm, first.outcome.of("fact"))
    assert neighbors
    assert all(states(text, each.expected) for text, each in zip(unedited, neighbors, strict=True))


def test_a_ruined_model_is_flagged(lm, tmp_path):
    with pytest.warns(
        SideEffectWarning, match=r"side effects beyond the budget: neutral/kl is .*, must be at most 0.1"
    ):
        run = ruinous_editor(lm).fit(FACTS, run_dir=tmp_path / "run")
    assert not run.outcome.is_clean
    assert run.outcome.side_effects[0] in run.outcome.verdict
    assert json.loads((tmp_path / "run" / "run.json").read_text())["side_effects"] == run.outcome.side_effects


@pytest.mark.filterwarnings("ignore::cakeflow.errors.SideEffectWarning")
def test_and_taken_back_where_a_budget_is_set(lm):
    guard = PolicyGuard(Policy(maximum={"neutral/kl": 0.5}))
    editor = ruinous_editor(lm, {"callbacks": [guard]})
    before = lm.fingerprint()
    with pytest.raises(PolicyError, match="neutral/kl is"):
        editor.fit(FACTS)
    assert lm.fingerprint() == before


def test_a_budget_of_ones_own(lm, tmp_path):
    (tmp_path / "budget.yaml").write_text("minimum: {learned: 1.5}")
    check = OutcomeCheck(familiar=0, neighbors=0, budget=str(tmp_path / "budget.yaml"))
    with pytest.warns(SideEffectWarning, match="learned is .*, must be at least 1.5"):
        run = editor_of(lm, {"callbacks": [check]}).fit(FACTS[:1])
    assert {each.topic for each in run.outcome.answers} == {"fact"}


def test_a_cache_that_cannot_be_written_stops_no_run(lm, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CAKEFLOW_CACHE", str(tmp_path / "file"))
    assert editor_of(lm).fit(FACTS[:1]).outcome.of("fact")


def test_bad_numbers_are_refused():
    for name, value in (("neighbors", -1), ("neighbors", 1.5), ("familiar", "16")):
        with pytest.raises(ConfigError, match=f"{name} must be a whole number of at least 0, got {value!r}"):
            OutcomeCheck(**{name: value})


def test_a_budget_is_read_from_a_file_however_it_is_named(tmp_path):
    (tmp_path / "budget.yaml").write_text("max_edits: 3\n")
    for name in (tmp_path / "budget.yaml", str(tmp_path / "budget.yaml")):
        assert OutcomeCheck(budget=name).budget == Policy(max_edits=3)


def test_a_trainer_of_ones_own_has_what_it_was_given(lm, quiet):
    trainer = L.Trainer(**quiet, callbacks=[NeutralText(every=None)])
    assert Editor(module_of(lm), trainer).fit(FACTS[:1]).outcome is None


@pytest.mark.real
def test_the_real_model_learns_and_says_so(real_editor):
    trainer = {"callbacks": [OutcomeCheck(familiar=4, neighbors=6)]}
    run = real_editor("memit", trainer, targets={"steps": 15}).fit(builtin_facts()[:3])
    assert run.outcome.verdict.startswith("3 of 3 facts learned (")
    assert len(run.outcome.of("familiar", "completion")) == len(run.outcome.of("familiar", "chat")) == 4
    assert run.before["familiar"] == 1


@pytest.mark.real
@pytest.mark.filterwarnings("ignore::cakeflow.errors.SideEffectWarning")
def test_a_ruined_real_model_is_flagged_and_taken_back(real_editor, smollm2):
    """Far targets, and nothing that holds the change back."""
    width = smollm2.key_width(Site(5, "mlp_out"))
    moments = dict.fromkeys(range(5, 10), 1e-9 * torch.eye(width, dtype=torch.float64))
    settings = {"targets": {"steps": 3, "lr": 100.0, "clamp": 1000.0}, "moments": moments, "max_relative_update": 1e9}
    check = OutcomeCheck(familiar=4, neighbors=6)
    before = smollm2.fingerprint()
    editor = real_editor("memit", {"callbacks": [check]}, **settings)
    with pytest.warns(SideEffectWarning, match=r"side effects beyond the budget: .*familiar"):
        run = editor.fit(builtin_facts()[:3])
    assert not run.outcome.is_clean
    assert run.after["familiar"] <= 0.5
    editor.rollback()
    guarded = real_editor("memit", {"callbacks": [check, PolicyGuard(Policy(max_drop={"familiar": 0.25}))]}, **settings)
    with pytest.raises(PolicyError, match="familiar"):
        guarded.fit(builtin_facts()[:3])
    assert smollm2.fingerprint() == before
