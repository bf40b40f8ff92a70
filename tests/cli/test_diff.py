"""Two edited models side by side."""

from dataclasses import replace

import pytest
from tiny_runs import editor_of, finished_run, name_of

from cakeflow.cli.command_line import run_command as main
from cakeflow.cli.diff import run_diff
from cakeflow.errors import ConfigError
from cakeflow.models.loading import load_model


def test_two_runs_differ_in_facts_answers_and_weights(lm, requests, tmp_path, capsys):
    finished_run(lm, tmp_path, requests)
    base = load_model(str(tmp_path / "model"))
    other = [requests[0], replace(requests[1], target_new="Oslo"), requests[7]]
    editor_of(base).fit(other, run_dir=tmp_path / "other")
    tables = main(["diff", str(tmp_path / "run"), str(tmp_path / "other"), "--model", str(tmp_path / "model")])
    facts = {row["prompt"]: (row["first"], row["second"]) for row in tables["Facts"]}
    assert requests[0].text not in facts
    assert facts[requests[1].text] == (requests[1].target_new, "Oslo")
    assert facts[requests[7].text] == ("", requests[7].target_new)
    assert facts[requests[2].text] == (requests[2].target_new, "")
    assert {row["tensor"] for row in tables["Weights that differ"]} == {name_of(lm, layer) for layer in (1, 3)}
    printed = capsys.readouterr().out
    assert "Facts" in printed
    assert "Weights that differ" in printed


def test_a_model_does_not_differ_from_itself_and_its_export_from_the_run(lm, requests, tmp_path, capsys):
    finished_run(lm, tmp_path, requests).save_pretrained(tmp_path / "edited")
    model, run = str(tmp_path / "model"), str(tmp_path / "run")
    assert run_diff(model, model, asks=3) == {"Facts": [], "Answers that differ": [], "Weights that differ": []}
    tables = run_diff(run, str(tmp_path / "edited"), model, 3)
    assert tables["Weights that differ"] == tables["Answers that differ"] == []
    assert len(tables["Facts"]) == 6  # a folder of weights does not say which facts are in it
    assert "Weights that differ: none" in capsys.readouterr().out


def test_the_number_of_facts_to_ask_is_checked_before_a_model_loads():
    with pytest.raises(ConfigError, match="asks must be a whole number of at least 0, got -5"):
        run_diff("no such model", "no such model", asks=-5)


def test_other_architectures(tiny, lm, tmp_path):
    for name, each in (("one", tiny), ("two", lm)):
        each.model.save_pretrained(tmp_path / name)
        each.tokenizer.save_pretrained(tmp_path / name)
    if type(tiny.model) is type(lm.model):
        assert run_diff(str(tmp_path / "one"), str(tmp_path / "two"), asks=1)["Weights that differ"] == []
    else:
        with pytest.raises(ConfigError, match="compare models of one architecture"):
            run_diff(str(tmp_path / "one"), str(tmp_path / "two"), asks=1)
