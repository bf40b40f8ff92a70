"""The search for a model's numbers: its order and budget on a formula, and whole on a tiny model."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import yaml

from cakeflow.core.config import build_module
from cakeflow.data.request import EditRequest, Probe
from cakeflow.errors import ConfigError
from cakeflow.forward.generation import continuations
from cakeflow.tuning import Numbers, tune
from cakeflow.tuning.search import VALUES, best_numbers, stated_facts
from cakeflow.tuning.trials import Trials

FIRST = Numbers(layers=(5, 6, 7, 8, 9))


def formula(best):
    """A score that is highest at some numbers, and counts how often it is asked."""
    calls = []

    def score(name, value, numbers):
        calls.append((name, value))
        return sum(getattr(numbers, name) == number for name, number in best.items()) / len(best)

    return score, calls


def test_every_number_takes_the_value_with_the_highest_score():
    best = {"lr": 0.5, "layers": (3, 4, 5, 6, 7), "steps": 50, "null_threshold": 0.01, "cov_weight": 1500.0}
    score, calls = formula(best)
    numbers, left_out = best_numbers(FIRST, 20, score)
    assert numbers == Numbers(**best)
    assert left_out == []
    assert len(calls) == sum(map(len, VALUES.values()))


def test_a_number_stays_unless_another_one_is_better():
    numbers, _ = best_numbers(FIRST, 20, lambda *_: 0.5)
    assert numbers == FIRST


def test_windows_stay_within_the_model_and_leave_out_the_first_block():
    score, calls = formula({"lr": 1.0})
    best_numbers(Numbers(layers=(1, 2)), 5, score)
    assert [value for name, value in calls if name == "layers"] == [(1, 2), (3, 4)]


def test_a_spent_budget_ends_the_search_with_the_best_so_far():
    score, calls = formula({"lr": 0.5, "steps": 50})
    numbers, left_out = best_numbers(FIRST, 20, lambda *words: score(*words) if len(calls) < 6 else None)
    assert numbers == Numbers(layers=FIRST.layers, lr=0.5)
    assert left_out == ["layers", "steps", "null_threshold", "cov_weight"]


def facts_of(lm):
    """Facts that the tiny model states, with another name as the new target."""
    names = ("Ann", "Bob", "Lund", "Zoe", "Rome", "Max", "Oslo", "Kim", "Paris", "Tom")
    prompts = ("The sea of {} is", "{} plays the", "The city of {} lies in")
    texts = [(prompt, name) for prompt in prompts for name in names]
    answers = continuations(lm, [prompt.replace("{}", name) for prompt, name in texts], 8)
    return [
        EditRequest(
            prompt=prompt,
            subject=name,
            target_new="blue",
            target_true=answer.split()[0],
            probes=(Probe("paraphrase", f"I say {name} is"), Probe("neighborhood", "The sea of Nice is")),
        )
        for (prompt, name), answer in zip(texts, answers, strict=True)
        if answer.split() and answer.split()[0].isalnum()
    ]


@pytest.fixture
def facts(lm):
    """``facts_of`` the tiny model."""
    return facts_of(lm)


def test_facts_that_the_model_does_not_state_are_left_out(lm, facts):
    wrong = EditRequest(prompt="The sea of {} is", subject="Bonn", target_new="blue", target_true="qqq")
    assert wrong not in stated_facts(lm, [*facts, wrong])


def test_too_few_facts_are_refused_with_the_remedy(lm, facts):
    with pytest.raises(ConfigError, match=r"states 3 of 3 facts, and 8 are needed.*--data FILE"):
        stated_facts(lm, facts[:3])


@pytest.mark.parametrize(("edits", "count"), [(100, 3), (15, 4)])
def test_numbers_that_allow_no_choice_are_refused(lm, tmp_path, edits, count):
    with pytest.raises(ConfigError, match=f"facts={count} and edits={edits}"):
        tune(lm, "tiny", tmp_path / "trials.jsonl", edits=edits, facts=count)


def searched(lm, folder, edits=40):
    """Searches on the tiny model with 4 facts a trial; the result, and the trials that it names."""
    trials = []
    result = tune(
        lm,
        str(folder / "model"),
        folder / "trials.jsonl",
        data=facts_of(lm),
        edits=edits,
        facts=4,
        tokens=640,
        notify=trials.append,
    )
    return result, trials


@pytest.fixture(scope="module")
def done(_models, tmp_path_factory):
    """A search of 40 edits, its trials, the folder with the model and their file, and hashes before and behind it."""
    folder, lm = tmp_path_factory.mktemp("search"), copy.deepcopy(_models["gpt2"])
    lm.model.save_pretrained(folder / "model")
    lm.tokenizer.save_pretrained(folder / "model")
    before = lm.fingerprint()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAKEFLOW_CACHE", str(folder / "cache"))
        return *searched(lm, folder), folder, (before, lm.fingerprint())


def test_a_search_keeps_to_its_budget_and_leaves_the_model_as_it_was(done):
    result, trials, _, hashes = done
    assert sum(trial.edits for trial in trials) <= 40
    assert len(result.trials) == 8
    assert len(result.checks) == 2
    assert result.left_out
    assert hashes[0] == hashes[1]
    highest = max(trial.score for trial in result.trials if trial.name.startswith("lr"))
    assert any(trial.name == f"lr {result.numbers.lr}" and trial.score == highest for trial in result.trials)


def test_an_interrupted_search_goes_on_where_it_was(done, lm, tmp_path, monkeypatch):
    whole, trials, folder, _ = done
    shutil.copy(folder / "trials.jsonl", tmp_path)

    def refuse(*_):
        raise AssertionError("a trial of the file was made again")

    monkeypatch.setattr(Trials, "_measured", refuse)
    again, same = searched(lm, tmp_path)
    assert same == trials
    assert again.numbers == whole.numbers


def test_a_file_that_is_none_of_trials_is_refused(lm, tmp_path):
    (tmp_path / "trials.jsonl").write_text(json.dumps({"key": 1}) + "\n")
    with pytest.raises(ConfigError, match=r"trials\.jsonl, line 1.*delete the file"):
        searched(lm, tmp_path)


def test_the_config_has_the_numbers_and_every_trial(done, tmp_path):
    result = done[0]
    (tmp_path / "mine.yaml").write_text(text := result.config())
    assert sum(line.startswith("#   alphaedit") for line in text.splitlines()) == len(result.trials) + 2
    module = build_module([tmp_path / "mine.yaml"])
    assert module.layers == list(result.numbers.layers)
    assert module.targets.lr == result.numbers.lr
    assert module.statistics.null_threshold == result.numbers.null_threshold
    assert module.contexts == result.contexts
    assert yaml.safe_load(text)["model"]["scores"].keys() == set(result.numbers.layers)


def test_a_name_cannot_write_into_the_config(done):
    result = done[0]
    name = "mine\nmodel: {base: other}\x85layers: [1]"
    config = replace(result, base=name, reason=name).config()
    assert yaml.safe_load(config)["model"]["base"] == name
    assert yaml.safe_load(config).keys() == {"model"}
    assert len(config.split("\n")) == len(replace(result, base="mine").config().split("\n"))


def test_a_batch_that_cannot_be_solved_is_a_trial_without_a_score(lm, tmp_path, monkeypatch):
    for name, values in {"lr": (0.1,), "layers": (0,), "steps": (25,), "null_threshold": (1e-30,)}.items():
        monkeypatch.setitem(VALUES, name, values)
    result, trials = searched(lm, tmp_path, edits=16)
    failed = next(trial for trial in trials if trial.name == "null_threshold 1e-30")
    assert "nothing could change" in failed.fault
    assert failed.score == 0
    assert result.numbers.null_threshold == 0.02
    assert failed.fault in result.config()
