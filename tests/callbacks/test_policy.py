"""A policy forbids edits, or takes them back; what it did is on record."""

import pytest
from pydantic import ValidationError
from tiny_runs import editor_of, state

from cakeflow.callbacks import Policy, PolicyGuard, Retention
from cakeflow.errors import ConfigError, PolicyError
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


def told(folder):
    entries = read_entries(folder / "journal/ledger.jsonl")
    kinds = ("batch", "policy", "rollback", "end")
    return [(entry.kind, getattr(entry.body, "outcome", None)) for entry in entries if entry.kind in kinds]


def test_a_run_that_keeps_it_goes_through(lm, requests, tmp_path):
    (tmp_path / "policy.yaml").write_text(RULES.format(name=lm.fingerprint()))
    editor = guarded(lm, str(tmp_path / "policy.yaml"))
    run = editor.fit(requests[1:5], 2, run_dir=tmp_path / "run")
    assert run.after["efficacy"] >= 0.5
    assert told(tmp_path / "run") == [("batch", None)] * 2 + [("policy", "held"), ("end", None)]


@pytest.mark.parametrize(
    ("policy", "first", "words"),
    [
        (Policy(models=("another",)), 1, "may not be edited, only another"),
        (Policy(max_edits=3), 1, "4 edits in a run, at most 3"),
        (Policy(denied_subjects=("^The E", "(?i)eiffel")), 0, "entry 0, subject = 'The Eiffel Tower': denied by"),
    ],
    ids=["model", "number", "subject"],
)
@pytest.mark.parametrize("evaluate", [True, False])
def test_what_is_forbidden_is_refused_before_the_model_is_measured(
    lm, requests, tmp_path, policy, first, words, evaluate
):
    before, passes = lm.fingerprint(), []
    lm.model.register_forward_pre_hook(lambda *_: passes.append(1))
    editor = guarded(lm, policy)
    with pytest.raises(PolicyError, match="nothing was changed") as error:
        editor.fit(requests[first : first + 4], 2, run_dir=tmp_path / "run", evaluate=evaluate)
    assert words in str(error.value)
    assert len(passes) == 0
    assert (lm.fingerprint(), len(editor.journal)) == (before, 0)
    assert told(tmp_path / "run") == [("policy", "refused")]


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
    assert told(tmp_path / "run") == [("batch", None)] * 3 + [("rollback", None), ("policy", "broken, taken back")]


def test_thresholds_need_an_evaluation(lm, requests, tmp_path):
    before = lm.fingerprint()
    with pytest.raises(PolicyError, match="efficacy was not measured after the last edit"):
        guarded(lm, Policy(minimum={"efficacy": 0.0})).fit(requests[:2], evaluate=False, run_dir=tmp_path / "run")
    assert lm.fingerprint() == before


def test_a_refused_run_may_be_started_again_when_the_policy_allows_it(lm, requests, tmp_path):
    with pytest.raises(PolicyError):
        guarded(lm, Policy(max_edits=1)).fit(requests[:2], run_dir=tmp_path / "run")
    guarded(lm, Policy(max_edits=2)).fit(requests[:2], run_dir=tmp_path / "run")
    assert told(tmp_path / "run") == [("policy", "refused"), ("batch", None), ("policy", "held"), ("end", None)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_edit: 3", "max_edit = 3: .* rules are models, max_edits"),
        ("max_edits: 0", "max_edits = 0"),
        ("max_edits: many", "max_edits = 'many'"),
        ("max_edits: true", "max_edits = True: .* integer"),
        ("models: gpt2", "models = 'gpt2': .* tuple"),
        ("models: [1]", r"models\.0 = 1: .* string"),
        ("denied_subjects: ['(']", r"denied_subjects\.0 = '\(': .*no regular expression"),
        ("minimum: {efficacy: high}", r"minimum\.efficacy = 'high': .* number"),
        ("minimum: {efficacy: true}", r"minimum\.efficacy = True: .* number"),
        ("minimum: {1: 0.5}", r"minimum\.1"),
        ("minimum: [efficacy]", "minimum = .* dictionary"),
        ("max_drop: {efficacy: .nan}", r"max_drop\.efficacy = nan"),
        ("1: 2", "1 = 2: .* rules are models"),
        ("- 1", "expected rules"),
        ("", "expected rules"),
        ("a: [", "cannot be read"),
        ("a: !!python/object/apply:os.system ['true']", "cannot be read"),
    ],
)
def test_a_bad_policy_is_refused(tmp_path, text, words):
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as error:
        PolicyGuard(str(path))
    assert str(path) in str(error.value)


def test_a_policy_is_made_of_plain_data_and_does_not_change():
    policy = Policy(models=["a", "b"], denied_subjects=("x",), minimum={"efficacy": 1})
    assert (policy.models, policy.denied_subjects, policy.minimum) == (("a", "b"), ("x",), {"efficacy": 1.0})
    assert policy.hash == Policy(models=("a", "b"), denied_subjects=["x"], minimum={"efficacy": 1.0}).hash
    with pytest.raises(ValidationError, match="frozen"):
        policy.max_edits = 3
    with pytest.raises(ConfigError, match=r"max_edits = -1.* rules are models, max_edits"):
        Policy(max_edits=-1)


def test_a_policy_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        Policy.read(tmp_path / "none.yaml")
    assert Policy(max_edits=1).hash != Policy(max_edits=2).hash
