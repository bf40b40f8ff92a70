"""A policy forbids edits, or takes them back; what it did is on record."""

import copy
import sys

import lightning as L
import pytest
from tiny_runs import editor_of, state

from cakeflow.callbacks import Policy, PolicyGuard, Retention
from cakeflow.errors import PolicyError, ResumeError
from cakeflow.journal import Journal, request_hash
from cakeflow.journal.ledger import read_entries

RULES = """
models: [{name}]
max_edits: 4
denied_subjects: ['(?i)eiffel']
minimum: {{efficacy: 0.5, retention/edits: 4}}
max_drop: {{efficacy_exact: 0.0}}
"""


def guarded(lm, *policy):
    return editor_of(lm, {"callbacks": [Retention(), *(PolicyGuard(each) for each in policy)]})


def entries_of(folder):
    entries = read_entries(folder / "journal/ledger.jsonl")
    kinds = ("batch", "policy", "rollback", "end")
    return [(entry.kind, getattr(entry.body, "outcome", None)) for entry in entries if entry.kind in kinds]


def test_a_run_that_keeps_it_goes_through(lm, requests, tmp_path):
    (tmp_path / "policy.yaml").write_text(RULES.format(name=lm.fingerprint()))
    editor = guarded(lm, str(tmp_path / "policy.yaml"))
    run = editor.fit(requests[1:5], 2, run_dir=tmp_path / "run")
    assert run.after["efficacy"] >= 0.5
    batches = [("batch", None)] * 2
    assert entries_of(tmp_path / "run") == [("policy", "in force"), *batches, ("policy", "held"), ("end", None)]


@pytest.mark.parametrize(
    ("policy", "first", "words"),
    [
        (Policy(models=("0" * 64,)), 1, "may not be edited, only 0000000000000000"),
        (Policy(model_names=("another",)), 1, "may not be edited, only another"),
        (Policy(max_edits=3), 1, "4 edits in a run, at most 3"),
        (Policy(denied_subjects=("^The E", "(?i)eiffel")), 0, "entry 0, subject = 'The Eiffel Tower': denied by"),
    ],
    ids=["model", "name", "number", "subject"],
)
@pytest.mark.parametrize("evaluate", [True, False])
def test_what_is_forbidden_is_refused_before_the_model_is_measured(
    lm, requests, tmp_path, policy, first, words, evaluate
):
    before, passes, editor = lm.fingerprint(), [], guarded(lm, policy)
    lm.model.register_forward_pre_hook(lambda *_: passes.append(1))
    with pytest.raises(PolicyError, match="nothing was changed") as error:
        editor.fit(requests[first : first + 4], 2, run_dir=tmp_path / "run", evaluate=evaluate)
    assert words in str(error.value)
    assert len(passes) == 0
    assert (lm.fingerprint(), len(editor.journal)) == (before, 0)
    assert entries_of(tmp_path / "run") == [("policy", "refused")]


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (Policy(minimum={"specificity": 0.99}), "specificity was not measured"),
        (Policy(minimum={"efficacy": 1.1}), "must be at least 1.1"),
        (Policy(maximum={"layer3/share": 0.5}), "layer3/share is 1, must be at most 0.5"),
        (Policy(max_drop={"efficacy": -2.0}), "efficacy went from"),
    ],
    ids=["unknown", "minimum", "maximum", "drop"],
)
def test_edits_that_break_it_are_taken_back(lm, requests, tmp_path, policy, words):
    editor = editor_of(lm)
    editor.fit(requests[4:6], run_dir=tmp_path / "first")
    before = state(lm, editor.module)
    editor._trainer["callbacks"] = [PolicyGuard(policy)]
    with pytest.raises(PolicyError, match="were taken back") as error:
        editor.fit(requests[:4], 2, run_dir=tmp_path / "run")
    assert words in str(error.value)
    assert state(lm, editor.module) == before
    assert len(editor.journal) == 1
    kinds = [("batch", None), ("policy", "in force"), *[("batch", None)] * 2, ("policy", "broken"), ("rollback", None)]
    assert entries_of(tmp_path / "run") == kinds


def test_thresholds_need_an_evaluation(lm, requests, tmp_path):
    before = lm.fingerprint()
    with pytest.raises(PolicyError, match="efficacy was not measured after the last edit"):
        guarded(lm, Policy(minimum={"efficacy": 0.0})).fit(requests[:2], evaluate=False, run_dir=tmp_path / "run")
    assert lm.fingerprint() == before


def test_a_refused_run_may_be_started_again_when_the_policy_allows_it(lm, requests, tmp_path):
    with pytest.raises(PolicyError):
        guarded(lm, Policy(max_edits=1)).fit(requests[:2], run_dir=tmp_path / "run")
    guarded(lm, Policy(max_edits=2)).fit(requests[:2], run_dir=tmp_path / "run")
    after = [("policy", "in force"), ("batch", None), ("policy", "held"), ("end", None)]
    assert entries_of(tmp_path / "run") == [("policy", "refused"), *after]


def test_a_name_is_allowed_where_names_are(lm, requests, tmp_path):
    guarded(lm, Policy(models=("0" * 64,), model_names=(lm.name,))).fit(requests[:1], run_dir=tmp_path / "run")
    assert ("policy", "held") in entries_of(tmp_path / "run")


class Stop(L.Callback):
    """The process goes away before a batch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            raise RuntimeError("stopped")


def stopped(lm, requests, folder, *policy):
    """An editor whose run of three batches was stopped after the first."""
    editor = editor_of(lm, {"callbacks": [Stop(), *(PolicyGuard(each) for each in policy)]})
    with pytest.raises(RuntimeError, match="stopped"):
        editor.fit(requests[:3], 1, run_dir=folder)
    return editor


def test_the_refusal_of_a_run_that_goes_on_is_on_record(lm, requests, tmp_path):
    stopped(copy.deepcopy(lm), requests, tmp_path / "run")
    with pytest.raises(PolicyError, match="at most 1"):
        guarded(lm, Policy(max_edits=1)).fit(requests[:3], 1, run_dir=tmp_path / "run")
    assert entries_of(tmp_path / "run") == [("batch", None), ("policy", "refused")]
    editor_of(lm).fit(requests[:3], 1, run_dir=tmp_path / "run")
    assert entries_of(tmp_path / "run")[-1] == ("end", None)


def test_a_stopped_run_goes_on_under_its_policy_only(lm, requests, tmp_path):
    policy, fresh = Policy(minimum={"efficacy": 0.0}), copy.deepcopy(lm)
    stopped(copy.deepcopy(lm), requests, tmp_path / "run", policy)
    for editor in (editor_of(fresh), guarded(fresh, Policy(minimum={"efficacy": -1.0}))):
        with pytest.raises(ResumeError, match=policy.hash[:16]):
            editor.fit(requests[:3], 1, run_dir=tmp_path / "run")
    guarded(lm, policy).fit(requests[:3], 1, run_dir=tmp_path / "run")
    kinds = [("policy", "in force"), *[("batch", None)] * 3, ("policy", "held"), ("end", None)]
    assert entries_of(tmp_path / "run") == kinds


def test_a_stopped_run_is_used_only_once_it_was_judged(lm, requests, tmp_path):
    policy, fresh = Policy(minimum={"efficacy": 1.1}), copy.deepcopy(lm)
    before = fresh.fingerprint()
    editor = stopped(lm, requests, tmp_path / "run", policy)
    with pytest.raises(PolicyError, match="stopped before the policy"):
        editor.export(tmp_path / "out")
    with pytest.raises(PolicyError, match="stopped before the policy"):
        editor_of(fresh).load(tmp_path / "run")
    assert fresh.fingerprint() == before
    assert not (tmp_path / "out").exists()
    with pytest.raises(PolicyError, match="were taken back"):
        guarded(fresh, policy).fit(requests[:3], 1, run_dir=tmp_path / "run")
    assert entries_of(tmp_path / "run")[-2:] == [("policy", "broken"), ("rollback", None)]
    editor_of(fresh).load(tmp_path / "run")
    assert fresh.fingerprint() == before


def test_what_is_not_judged_may_be_taken_back(lm, requests, tmp_path):
    stopped(copy.deepcopy(lm), requests, tmp_path / "run", Policy(minimum={"efficacy": 1.1}))
    journal = Journal(lm)
    journal.load(tmp_path / "run/journal", judged=False)
    journal.rollback()
    editor_of(journal.model).load(tmp_path / "run")


def test_a_judgement_survives_a_crash_before_its_rollback(lm, requests, tmp_path):
    armed = [True]

    def crash(event, args):
        if armed[0] and event == "cakeflow.journal" and args[0] == "rollback":
            raise KeyboardInterrupt

    sys.addaudithook(crash)
    editor, fresh = guarded(lm, Policy(minimum={"efficacy": 1.1})), copy.deepcopy(lm)
    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            editor.fit(requests[:2], run_dir=tmp_path / "run")
    finally:
        armed[0] = False
    assert entries_of(tmp_path / "run")[-1] == ("policy", "broken")
    with pytest.raises(PolicyError, match="stopped before the policy"):
        editor_of(fresh).load(tmp_path / "run")


def test_refusals_are_on_record_without_texts_where_texts_are_not_recorded(lm, requests, tmp_path):
    editor = editor_of(lm, {"callbacks": [PolicyGuard(Policy(denied_subjects=("Eiffel",)))]}, record_texts=False)
    with pytest.raises(PolicyError, match="Eiffel"):
        editor.fit(requests[:1], run_dir=tmp_path / "run")
    text = (tmp_path / "run/journal/ledger.jsonl").read_text()
    assert "Eiffel" not in text
    assert request_hash(requests[0]) in text
    assert "denied_subjects.0" in text


def test_the_journal_itself_obeys(lm, requests, tmp_path):
    editor_of(copy.deepcopy(lm)).fit(requests[:2], run_dir=tmp_path / "run")
    editor, before = guarded(lm, Policy(denied_subjects=("eiffel",), max_edits=1)), lm.fingerprint()
    with pytest.raises(PolicyError, match="Eiffel"), editor.journal.batch(requests[:1]):
        pass
    with pytest.raises(PolicyError, match="2 edits in a run"), editor.journal.batch(requests[1:3]):
        pass
    with pytest.raises(PolicyError, match="Eiffel"):
        editor.load(tmp_path / "run")
    assert (lm.fingerprint(), len(editor.journal)) == (before, 0)


def test_a_run_without_texts_is_not_loaded_past_a_rule_about_them(lm, requests, tmp_path):
    editor_of(copy.deepcopy(lm), record_texts=False).fit(requests[:2], run_dir=tmp_path / "run")
    with pytest.raises(PolicyError, match="2 facts are on record without their texts"):
        guarded(lm, Policy(denied_subjects=("x",))).load(tmp_path / "run")
    guarded(lm, Policy(max_edits=2)).load(tmp_path / "run")


def test_a_run_is_loaded_if_its_metrics_on_record_hold(lm, requests, tmp_path):
    run = editor_of(copy.deepcopy(lm)).fit(requests[:2], run_dir=tmp_path / "run")
    with pytest.raises(PolicyError, match="efficacy is"):
        guarded(lm, Policy(minimum={"efficacy": 1.1})).load(tmp_path / "run")
    with pytest.raises(PolicyError, match="neutral/kl was not measured"):
        guarded(lm, Policy(maximum={"neutral/kl": 1.0})).load(tmp_path / "run")
    guarded(lm, Policy(minimum={"efficacy": run.after["efficacy"]})).load(tmp_path / "run")


def test_a_checkpoint_does_not_pass_a_policy(lm):
    editor = guarded(lm, Policy(max_edits=1))
    with pytest.raises(PolicyError, match="names no facts"):
        editor.module.on_load_checkpoint({})
