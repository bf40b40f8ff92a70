"""What the parser complains of, in plain words; the complaints are those of the library."""

import json

import pytest
from tiny_runs import module_of

from cakeflow.cli.command_line import run_command as main
from cakeflow.core.config import build_module, find_config, shipped
from cakeflow.core.config_errors import arguments_of, plain_message
from cakeflow.errors import ConfigError

METHOD = f"--config={shipped('method')['cake']}"


def complaint(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.limt", "3"], "unknown option --data.limt; did you mean '--data.limit'"),
        (["--data.limt=3"], "unknown option --data.limt; did you mean '--data.limit'"),
        (["--run_dr", "x"], "unknown option --run_dr; did you mean '--run_dir'?"),
        (["stray"], "unexpected word 'stray'"),
        (["--model.ruonds", "1"], "model (LocateThenEdit) has no setting 'ruonds'; did you mean 'rounds'?"),
        (["--model.targets.stps", "1"], "model.targets (GradientSearch) has no setting 'stps'; did you mean 'steps'"),
        (["--model.targets.learning_rate", "1"], "no setting 'learning_rate'; it has steps, lr, stride, betas, clamp"),
        (["--model.solver", "NulSpace"], "model.solver: there is no class 'NulSpace'; did you mean 'NullSpace'?"),
        (["--trainer.logger", "CSVLoger"], "trainer.logger: there is no class 'CSVLoger'; did you mean 'CSVLogger'"),
        (["--data.limit", "many"], "data.limit must be an integer or null, got 'many'"),
        (["--model.rounds", "x"], "model.rounds must be an integer, got 'x'"),
        (["--model.layers", "5"], "model.layers must be a list or auto, got '5'"),
        (["--model.memory_budget", "x"], "model.memory_budget must be a number or null, got 'x'"),
        (
            ["--data.conflicts", "drp"],
            "data.conflicts must be one of error, drop, keep, got 'drp'; did you mean 'drop'?",
        ),
        (["--model.fact_token", "subject_lst"], "got 'subject_lst'; did you mean 'subject_last'?"),
        (["--config", "absent.yaml"], "there is no file"),
    ],
)
def test_a_bad_option_is_one_line_and_a_hint(words, message, capsys):
    lines = complaint(["fit", METHOD, *words], capsys).splitlines()
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert lines[1:] == ["see cakeflow fit --help"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"trainer": {"max_epoch": 3}}, "a config has no 'trainer.max_epoch'; did you mean 'trainer.max_epochs'"),
        ({"model": {"class_path": "LocateThenEdt"}}, "model: there is no class 'LocateThenEdt'; did you mean"),
        (
            {"model": {"init_args": {"solver": {"class_path": "LeastSquares", "init_args": {"rigde": 1}}}}},
            "model.solver (LeastSquares) has no setting 'rigde'; did you mean 'ridge'?",
        ),
    ],
)
def test_a_bad_config_is_one_line_and_a_hint(config, message, capsys, tmp_path):
    (tmp_path / "bad.yaml").write_text(json.dumps(config))
    lines = complaint(["fit", f"--config={tmp_path / 'bad.yaml'}"], capsys).splitlines()
    assert message in lines[0]
    assert lines[1:] == ["see cakeflow fit --help"]


def test_python_says_it_in_the_same_words(tmp_path):
    (tmp_path / "bad.yaml").write_text(json.dumps({"model": {"init_args": {"ruonds": 1}}}))
    with pytest.raises(ConfigError, match=r"bad.yaml: model \(LocateThenEdit\) has no setting 'ruonds'; did you mean"):
        build_module([tmp_path / "bad.yaml"])
    with pytest.raises(ConfigError, match="no method config 'caek'; did you mean 'cake'"):
        find_config("method", "caek")


def test_a_complaint_that_is_not_known_stays_as_it_is():
    assert plain_message("of another kind\n  with lines", (), {}) == "of another kind\n  with lines"


def test_arguments_are_those_of_the_bases_that_they_are_handed_on_to():
    class Base:
        def __init__(self, size=1, *, name=""): ...

    class Middle(Base):
        pass

    class Part(Middle):
        def __init__(self, name, **common): ...

    class Closed(Part):
        def __init__(self, depth): ...

    assert list(arguments_of(Part)) == ["name", "size"]
    assert list(arguments_of(Closed)) == ["depth"]
    assert list(arguments_of(Middle)) == ["size", "name"]
    assert arguments_of(object) == {}


@pytest.mark.parametrize("name", ["rounds", "repairs", "reread_keys"])
def test_a_number_that_cannot_be_left_out_is_refused_at_once(lm, name):
    with pytest.raises(ConfigError, match=f"{name} must be a whole number of at least 0, got None"):
        module_of(lm, **{name: None})
