"""``cakeflow evaluate --run``: the model is the edited one, and the run's folder stays as it is."""

import copy
import shutil
import sys
from pathlib import Path

import pytest
from tiny_runs import content, editor_of, finished_run

from cakeflow.cli.command_line import run_command as main
from cakeflow.cli.evaluate import take_run
from cakeflow.errors import ConfigError

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]


@pytest.fixture(autouse=True)
def _no_words_of_pytest(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cakeflow"])


@pytest.fixture(scope="module")
def finished(_models, tmp_path_factory, requests):
    """A finished run of three batches of two facts, and what its editor measures."""
    folder = tmp_path_factory.mktemp("finished")
    editor = finished_run(copy.deepcopy(_models["llama"]), folder, requests)
    return folder, editor.evaluate(requests[:6])


@pytest.fixture
def folder(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "work")
    return tmp_path / "work"


def test_the_edited_model_is_measured_on_its_own_facts_and_the_run_stays_as_it_is(folder, finished, requests, capsys):
    words = ["evaluate", "--run", str(folder / "run"), "--model", str(folder / "model"), *QUIET]
    before = content(folder / "run")
    result = main(words)
    assert content(folder / "run") == before
    assert result.metrics == pytest.approx(finished[1].metrics, nan_ok=True)
    assert result.requests == finished[1].requests
    assert "efficacy" in capsys.readouterr().out
    (written,) = Path("runs/cakeflow").glob("*/now.jsonl")
    assert len(written.read_text().splitlines()) == 6
    unedited = main(["evaluate", "--model", str(folder / "model"), "--model.layers=[1]", *QUIET])
    assert unedited.requests[0].subject != requests[0].subject  # without --run, the built-in facts


def test_callbacks_that_need_no_run_measure_the_edited_model(folder, requests):
    words = ["evaluate", "--run", str(folder / "run"), "--model", str(folder / "model"), *QUIET]
    checks = ["--trainer.callbacks=ContextCheck", "--trainer.callbacks.lengths=[3]"]
    checks += ["--trainer.callbacks+=KnowledgeCheck", "--trainer.callbacks.limit=2"]
    result = main([*words, *checks])
    assert {"context/alone", "context/text_3", "knowledge/new", "knowledge/restored"} <= set(result.metrics)
    assert result.metrics["knowledge/restored"] == 1


def test_facts_that_were_taken_back_are_neither_in_the_model_nor_asked(folder, finished, capsys):
    main(["rollback", str(folder / "run"), "--batch", "0", "--model", str(folder / "model")])
    before = content(folder / "run")
    words = ["evaluate", f"--run={folder / 'run'}", f"--model.base={folder / 'model'}", "--data.limit=3", *QUIET]
    result = main(words)
    assert content(folder / "run") == before
    assert [each.key for each in result.requests] == [each.key for each in finished[1].requests[2:5]]
    assert result.requests[0].prompts != finished[1].requests[2].prompts  # batch 0 had changed these answers too


def test_other_data_and_the_name_that_the_run_has(lm, requests, tmp_path):
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    lm.model.name_or_path = str(tmp_path / "model")
    editor = editor_of(lm)
    editor.fit(requests[:2], run_dir=tmp_path / "run", evaluate=False)
    (tmp_path / "one.json").write_text('[{"prompt": "{} plays", "subject": "Ann", "target_new": "chess"}]')
    result = main(["evaluate", "--run", "run", "--data", "one.json", *QUIET])
    assert result.requests == editor.evaluate(tmp_path / "one.json").requests


@pytest.mark.parametrize("place", ["run", "run/again"])
def test_the_evaluation_is_not_written_into_the_run(place, folder, capsys):
    before = content(folder / "run")
    with pytest.raises(SystemExit):
        main(["evaluate", "--run", str(folder / "run"), "--run_dir", str(folder / place), *QUIET])
    assert "name another one" in " ".join(capsys.readouterr().err.split())
    assert content(folder / "run") == before


def test_a_run_without_texts_needs_data(lm, requests, tmp_path, capsys):
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    editor_of(lm, record_texts=False).fit(requests[:2], run_dir=tmp_path / "run", evaluate=False)
    with pytest.raises(SystemExit):
        main(["evaluate", "--run", "run", "--model", "model", *QUIET])
    assert "name some: --data FILE" in " ".join(capsys.readouterr().err.split())


def test_run_is_an_option_of_evaluate_only():
    assert take_run(["fit", "--run", "x"]) == (["fit", "--run", "x"], None)
    assert take_run(["evaluate", "--run_dir", "x"]) == (["evaluate", "--run_dir", "x"], None)
    words, edited = take_run(["evaluate", "--data", "d", "--run", "x", "--model=m"])
    assert words == ["evaluate", "--data", "d", "--model=m", "--model.layers", "auto"]
    assert (edited.run, edited.own_model, edited.own_data) == (Path("x"), False, False)
    assert take_run(["evaluate", "--run=x"])[1].own_model
    assert take_run(["evaluate", "--run=x", "--config", "c"])[0] == ["evaluate", "--config", "c"]
    for bad in (["--run"], ["--run="], ["--run", "--data"]):
        with pytest.raises(ConfigError, match="needs a run folder"):
            take_run(["evaluate", *bad])


def test_a_recipe_without_layers_gets_the_runs_own_model_and_no_layers(finished):
    words, edited = take_run(["evaluate", "--run", str(finished[0] / "run"), "--method", "vit_heads"])
    assert "--model.layers" not in words
    assert words[-2] == "--model.base"
    assert edited.own_model
    words, edited = take_run(["evaluate", "--run", "x", "--method=vit_heads", "--model", "somewhere"])
    assert words == ["evaluate", "--method=vit_heads", "--model", "somewhere"]
    assert not edited.own_model
