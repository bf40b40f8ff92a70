"""The rules of a policy: whom they refuse, in whatever spelling, and in how much time."""

import time

import pytest
from pydantic import ValidationError

from cakeflow.data import EditRequest
from cakeflow.errors import ConfigError
from cakeflow.journal import Policy

TOWER = Policy(denied_subjects=(r"\bEiffel Tower\b", r"\bChávez\b", "Путин"))


def reasons(policy, prompt, subject, target="Rome"):
    return [str(each) for each in policy.refusals(["m", "0" * 64], [EditRequest(prompt, subject, target)])]


@pytest.mark.parametrize(
    ("prompt", "subject", "target", "field"),
    [
        ("{} is in", "Eiffel Tower", "Rome", "subject"),
        ("{} is in", "EIFFEL  tower", "Rome", "subject"),
        ("{} is in", "Eiffel\u200b To\u00adwer", "Rome", "subject"),
        ("{} is in", "Eiffel\u00a0Tower", "Rome", "subject"),
        ("{} is in", "Eiffel\u2800Tower", "Rome", "subject"),
        ("{} is in", "\u0415iff\u0435l T\u043ewer", "Rome", "subject"),
        ("{} is in", "\uff25\uff49\uff46\uff46\uff45\uff4c \uff34ower", "Rome", "subject"),
        ("{} is in", "Eiffe\u04cf Tower", "Rome", "subject"),
        ("{} is in", "E\u0336i\u0336ffel Tower", "Rome", "subject"),
        ("{} is in", "\u1d07iffel Tower", "Rome", "subject"),
        ("{} was born in", "Cha\u0301vez", "Rome", "subject"),
        ("{} was born in", "Chavez", "Rome", "subject"),
        ("{} lives in", "путин", "Rome", "subject"),
        ("{} lives in", "Пyтин", "Rome", "subject"),
        ("The Eiffel {} is in", "Tower", "Rome", "prompt"),
        ("In {}, the Eiffel Tower is in", "France", "Rome", "prompt"),
        ("{} sees the", "Ann", "Eiffel Tower", "target_new"),
        ("{} sees the Eiffel", "Ann", "Tower", "prompt and target_new"),
    ],
)
def test_a_denied_fact_is_refused_in_other_words(prompt, subject, target, field):
    (reason,) = reasons(TOWER, prompt, subject, target)
    assert reason.startswith(f"entry 0, {field} = ")
    assert "denied by" in reason


@pytest.mark.parametrize("subject", ["Eiffel", "Towers of Eiffel", "Charles de Gaulle", "Chaves", "Лондон", "东京塔"])
def test_other_facts_pass(subject):
    assert reasons(TOWER, "{} is in", subject) == []


def test_the_target_before_the_edit_counts_too():
    request = EditRequest("{} sees the", "Ann", "sea", "Eiffel Tower")
    assert [str(each)[:21] for each in TOWER.refusals(["m"], [request])] == ["entry 0, target_true "]


@pytest.mark.parametrize("pattern", ["(a+)+$", r"^(\w+\s?)*president$", "(x+x+)+y", "(?:a|aa)+$"])
def test_patterns_are_decided_in_bounded_time_or_refuse(pattern):
    requests = [EditRequest("{} plays", letter * 10_000 + "!", "tennis") for letter in "aax"]
    policy, start = Policy(denied_subjects=(pattern,)), time.process_time()
    refusals = [str(each) for each in policy.refusals(["m"], requests)]
    assert time.process_time() - start < 1
    assert all("not decided within 0.4 s" in each for each in refusals)
    assert len(refusals) <= 1  # once too slow, a pattern is not tried again


def test_a_pattern_that_takes_too_long_refuses():
    assert reasons(Policy(denied_subjects=("(a+)+$",)), "{} plays", "a" * 10_000 + "!")


def test_models_are_named_by_fingerprint_unless_names_are_allowed():
    request = [EditRequest("{} plays", "Ann", "tennis")]
    allowed, other = "1" * 64, "2" * 64
    assert list(Policy(models=(allowed,)).refusals(["m", allowed], request)) == []
    assert list(Policy(models=(allowed,)).refusals([allowed, other], request)) != []
    assert list(Policy(model_names=("m",)).refusals(["m", other], request)) == []
    assert list(Policy(models=(allowed,), model_names=("m",)).refusals(["n", other], request)) != []


def test_a_range_of_letters_that_has_no_sense_in_ascii_is_matched_as_it_is():
    policy = Policy(denied_subjects=("^[\u0455-\u0456]$",))  # DZE looks like s, BYELORUSSIAN-UKRAINIAN I like i
    assert reasons(policy, "{} is", "\u0456")
    assert not reasons(policy, "{} is", "z")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_edit: 3", "max_edit = 3: .* rules are models, model_names, max_edits"),
        ("max_edits: 0", "max_edits = 0"),
        ("max_edits: many", "max_edits = 'many'"),
        ("max_edits: true", "max_edits = True: .* integer"),
        ("models: gpt2", "models = 'gpt2': .* tuple"),
        ("models: [1]", r"models\.0 = 1: .* string"),
        ("models: [gpt2]", r"models\.0 = 'gpt2': .* names go to model_names"),
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
        Policy.read(path)
    assert str(path) in str(error.value)


def test_a_policy_is_made_of_plain_data_and_does_not_change():
    policy = Policy(model_names=["a", "b"], denied_subjects=("x",), minimum={"efficacy": 1})
    assert (policy.model_names, policy.denied_subjects, policy.minimum) == (("a", "b"), ("x",), {"efficacy": 1.0})
    assert policy.hash == Policy(model_names=("a", "b"), denied_subjects=["x"], minimum={"efficacy": 1.0}).hash
    with pytest.raises(ValidationError, match="frozen"):
        policy.max_edits = 3
    with pytest.raises(ConfigError, match=r"max_edits = -1.* rules are models, model_names, max_edits"):
        Policy(max_edits=-1)


def test_a_policy_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        Policy.read(tmp_path / "none.yaml")
    assert Policy(max_edits=1).hash != Policy(max_edits=2).hash
