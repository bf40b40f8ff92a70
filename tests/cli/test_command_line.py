"""The command line, run in this process on a tiny model in a folder."""

import json
import shlex
import sys

import pytest
import yaml

from cakeflow.__main__ import main as script
from cakeflow.cli.command_line import run_command as main
from cakeflow.cli.words import expand_names
from cakeflow.core.checkpoint import SafeCheckpointIO
from cakeflow.core.config import shipped
from cakeflow.core.locate_then_edit import LocateThenEdit
from cakeflow.report import verdict


@pytest.fixture(autouse=True)
def _no_words_of_pytest(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cakeflow"])  # Lightning warns when words are given beside the process's own


@pytest.fixture
def folder(workplace):
    words = [
        f"The {a} of {b} is near the {c}." for a in ("city", "sea", "name") for b in ("Ann", "Rome") for c in "abcdefgh"
    ]
    (workplace / "corpus.txt").write_text(" ".join(words * 10))
    facts = [
        {
            "prompt": "{} lives in",
            "subject": name,
            "target_new": "Rome",
            "target_true": "Paris",
            "probes": [
                {"kind": "paraphrase", "prompt": f"The home of {name} is"},
                {"kind": "neighborhood", "prompt": "Zoe lives in"},
            ],
        }
        for name in ("Ann", "Bob", "Cleo")
    ]
    (workplace / "facts.json").write_text(json.dumps(facts))
    return workplace


def arguments(folder, command, *more):
    base = [
        "--model.base",
        str(folder / "model"),
        "--model.layers",
        "[1,2,3]",
        "--data.source",
        str(folder / "facts.json"),
    ]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    return [command, f"--config={shipped('method')['alphaedit']}", *base, *quiet, *more]


def test_the_numbers_of_a_model_serve_a_folder_too(capsys):
    words = ["fit", "--model", "folder", "--model_config", "smollm2-135m", "--method", "memit", "--model.rounds", "3"]
    names = [("method", "memit"), ("model", "smollm2-135m")]
    configs = [word for kind, name in names for word in ("--config", str(shipped(kind)[name]))]
    assert expand_names(words) == ["fit", *configs, "--model.base", "folder", "--model.rounds", "3"]
    with pytest.raises(SystemExit):
        main([*words, "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    tuned = yaml.safe_load(shipped("model")["smollm2-135m"].read_text())["model"]
    assert printed["base"] == "folder"
    assert printed["layers"] == tuned["layers"]
    with pytest.raises(SystemExit):
        main(["fit", "--model", "folder", "--model_config", "smolm2-135m", "--data", "builtin"])
    assert "no model config 'smolm2-135m'; did you mean 'smollm2-135m'?" in capsys.readouterr().err


def test_print_config_shows_the_composition_and_loads_nothing(capsys):
    configs = [f"--config={shipped(kind)[name]}" for kind, name in (("method", "cake"), ("model", "smollm2-135m"))]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *configs, "--model.targets.lr", "0.25", "--print_config"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    assert "NullSpace" in printed
    assert "lr: 0.25" in printed


@pytest.mark.parametrize(
    "words",
    [
        ["--model.solver", "NoSuchSolver"],
        ["--model.targets.learning_rate", "1"],
        ["--model.targets.essence.factor", "-1"],
        ["--model.solver.init_args.threshhold", "0.1"],
        ["--data.limit", "many"],
    ],
)
def test_a_wrong_name_is_refused_before_a_model_loads(words, folder, monkeypatch, capsys):
    monkeypatch.setattr("cakeflow.evaluation.evaluation.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stop:
        main(arguments(folder, "fit", *words))
    assert stop.value.code == 2
    assert words[0].split(".")[-1] in capsys.readouterr().err


def test_bad_requests_end_with_status_2_and_name_every_entry(folder, monkeypatch, capsys):
    monkeypatch.setattr("cakeflow.evaluation.evaluation.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    (folder / "facts.json").write_text(json.dumps([{"prompt": "no slot", "subject": "x", "target_new": " "}, {}]))
    with pytest.raises(SystemExit) as stop:
        main(arguments(folder, "fit"))
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert "entry 0, prompt" in message
    assert "entry 0, target_new" in message
    assert "entry 1, prompt" in message


@pytest.mark.parametrize("command", ["fit", "evaluate"])
def test_what_the_model_cannot_read_is_named_before_it_is_measured(command, folder, monkeypatch, capsys):
    monkeypatch.setattr("cakeflow.evaluation.evaluation.Evaluation.ask", lambda *_: pytest.fail("records were scored"))
    facts = [
        {"prompt": "{} lives in", "subject": name, "target_new": "Rome"} for name in ("Ann", "word " * 999 + "end")
    ]
    (folder / "facts.json").write_text(json.dumps(facts))
    with pytest.raises(SystemExit) as stop:
        main(arguments(folder, command, "--data.eval_batch_size=1"))
    assert stop.value.code == 2
    assert "entry 1, prompt = " in capsys.readouterr().err
    assert not (folder / "runs" / "cakeflow" / "version_0" / "before.jsonl").exists()


def test_fit_edits_prints_tables_and_leaves_a_run_folder(folder, capsys):
    words = ["--model.statistics.source", str(folder / "corpus.txt"), "--model.statistics.tokens", "2048",
             "--model.statistics.window", "64", "--model.solver.init_args.threshold", "10",
             "--model.solver.init_args.inner.init_args.ridge", "0.01", "--model.targets.lr", "0.5",
             "--trainer.enable_checkpointing", "true"]  # fmt: skip
    done = main(arguments(folder, "fit", *words))
    printed = capsys.readouterr().out
    assert done.after["efficacy"] >= done.before["efficacy"]
    for title in ("Metrics", "Time"):
        assert title in printed
    assert verdict(done.journal) in " ".join(printed.split())
    names = {path.relative_to(done.folder).as_posix() for path in done.folder.rglob("*")}
    assert {"config.yaml", "metrics.csv", "run.json", "journal/ledger.jsonl"} <= names
    assert {"journal/batch-00000.safetensors", "journal/original-00000-0.safetensors"} <= names
    header = (done.folder / "metrics.csv").read_text().splitlines()[0]
    assert "before/efficacy" in header
    assert "after/efficacy" in header
    assert "layer1/share" in header
    (checkpoint,) = done.folder.rglob("*.ckpt")
    assert SafeCheckpointIO().load_checkpoint(checkpoint)["global_step"] == 1
    assert "Contexts" in json.loads((done.folder / "run.json").read_text())["settings"]["contexts"]


def interrupted(words):
    """The exit status of a command that is interrupted before its first edit."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocateThenEdit, "prepare", interrupt)
        with pytest.raises(SystemExit) as stop:
            main(words)
    return stop.value.code


@pytest.mark.parametrize("words", [[], ["--run_dir", "my runs/one"], ["--run_dir=my runs/one"]])
def test_an_interrupt_prints_the_command_that_goes_on(words, folder, caplog, capsys):
    quick = ["--model.statistics.source", str(folder / "corpus.txt"), "--model.statistics.tokens", "2048",
             "--model.statistics.window", "64", "--model.targets.steps", "2", "--data.batch_size", "2"]  # fmt: skip
    typed = arguments(folder, "fit", *quick, *words)
    assert interrupted(typed) == 130
    (message,) = [line for line in caplog.messages if "go on with: " in line]
    program, *command = shlex.split(message.split("go on with: ")[1])
    assert program == "cakeflow"
    assert command == (typed if words else [*typed, "--run_dir", "runs/cakeflow/version_0"])
    assert "interrupted" in capsys.readouterr().err
    result = main(command)
    assert str(result.folder) == ("my runs/one" if words else "runs/cakeflow/version_0")
    assert len(result.journal) == 2


def test_a_run_with_a_logger_of_its_own_goes_on_as_it_was_typed(folder, caplog):
    words = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "runs", "--trainer.logger.version", "mine"]
    typed = arguments(folder, "fit", *words)
    assert interrupted(typed) == 130
    (message,) = [line for line in caplog.messages if "go on with: " in line]
    assert shlex.split(message.split("go on with: ")[1])[1:] == typed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ft"], "there is no command 'ft'; did you mean 'fit'?\nsee cakeflow --help"),
        (["--data.limit", "3", "fit"], "the command comes first"),
        (["fit", "--method", "caek"], "no method config 'caek'; did you mean 'cake'?"),
        (["fit", "--method", "cake", "--model", "smolm2-135m"], "'smolm2-135m'; did you mean 'smollm2-135m'?"),
        (["fit", "--model", "smolm2-135m", "--model.layers", "[3]"], "that loads here; did you mean 'smollm2-135m'?"),
        (["fit", "--model", "smollm2-135m", "--data", "builtn.json"], "'builtn.json'"),
        (["fit", "--model", "smollm2-135m", "--trainer.max_time", "soon"], "`Timer(duration='soon')` is not a valid"),
        (["report", "--oot", "x", "y"], "unknown option --oot; did you mean '--out'?\nsee cakeflow report --help"),
        (["report"], "required: run\nsee cakeflow report --help"),
        (["report", "nowhere"], "nowhere is no run folder"),
    ],
)
def test_a_bad_command_ends_with_status_2_and_a_message(words, message, workplace, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*words, "--data", "builtin"] if words[0] == "fit" and "--data" not in words else words)
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert message in printed.err
    assert printed.err.startswith("error: ")
    assert "usage" not in printed.err
    assert "Traceback" not in printed.err


def test_the_console_script_ends_with_status_0(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cakeflow", *arguments(folder, "evaluate")])
    assert script() is None


def test_evaluate_prints_the_metrics_and_changes_nothing(folder, capsys):
    result = main(arguments(folder, "evaluate"))
    assert set(result.metrics) >= {"efficacy", "generalization", "specificity", "editscore", "efficacy_exact"}
    assert "efficacy" in capsys.readouterr().out
