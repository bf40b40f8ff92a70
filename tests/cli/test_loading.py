"""How a model is loaded: every command that loads one hands the same options to model and tokenizer."""

import copy
import re
import sys
from inspect import signature
from pathlib import Path

import pytest
from tiny_runs import finished_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from cakeflow.__main__ import main as script
from cakeflow.cli.command_line import run_command as main
from cakeflow.cli.loading import take_loading, without_token
from cakeflow.cli.runs import COMMANDS
from cakeflow.errors import ConfigError

OPTIONS = {"revision": "v1", "subfolder": "part", "token": "hf_secret", "attn_implementation": "eager"}
WORDS = [f"--loading.{name}={value}" for name, value in OPTIONS.items()]
LOADS_NONE = {"recipes", "plugins", "report", "compare", "log", "verify"}
FACT = ["Ann plays", "tennis"]
MODEL = ["--model", "repository"]
LAYERS = [*MODEL, "--layers", "[1]"]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
COMMAND_WORDS = {
    "fit": ["fit", *MODEL, "--method", "memit", "--model.layers", "[1]", "--data", "builtin", *QUIET],
    "evaluate": ["evaluate", *MODEL, "--model.layers", "[1]", *QUIET],
    "evaluate --run": ["evaluate", "--run", "run", *MODEL, *QUIET],
    "edit": ["edit", *FACT, *LAYERS],
    "desk": ["desk", *LAYERS, "--port", "0"],
    "statistics": ["statistics", *LAYERS, "--source", "corpus.txt"],
    "trace": ["trace", *MODEL],
    "facts": ["facts", *MODEL],
    "tune": ["tune", "repository", "mine.yaml"],
    "benchmark": ["benchmark", *MODEL, "--model_config", "smollm2-135m", "--sizes", "[1]"],
    "diff": ["diff", "repository", "repository"],
    "diff of runs": ["diff", "run", "run", *MODEL],
    "replay": ["replay", "run", *MODEL],
    "reproduce": ["reproduce", "run", *LAYERS, "--method", "memit"],
    "rollback": ["rollback", "run", *MODEL],
    "undo": ["undo", "run", "Ann", *LAYERS, "--method", "memit"],
    "export": ["export", "run", "out", *MODEL],
    "apply": ["apply", "delta", "repository", "out"],
}


class LoadedError(BaseException):
    """Ends a command where it has loaded a model; no library takes it for a fault of the model."""


@pytest.fixture(scope="module")
def finished(_models, tmp_path_factory, requests):
    """A finished run, its delta, and its model in a folder of a repository."""
    folder = tmp_path_factory.mktemp("loading")
    editor = finished_run(copy.deepcopy(_models["llama"]), folder, requests)
    editor.export(folder / "delta", "delta")
    (folder / "repository").mkdir()
    (folder / "model").rename(folder / "repository/part")
    (folder / "corpus.txt").write_text("The city of Ann is near the sea. " * 200)
    return folder


@pytest.fixture
def asked(finished, monkeypatch, tmp_path):
    """The arguments that tokenizer and model were asked for with; a command ends where it would get the model."""
    monkeypatch.chdir(tmp_path)
    for each in finished.iterdir():
        Path(each.name).symlink_to(each)
    monkeypatch.setattr(sys, "argv", ["cakeflow"])  # Lightning warns when words are given beside the process's own
    seen = {}
    tokenizer = AutoTokenizer.from_pretrained

    def first(name, *args, **kwargs):
        seen["tokenizer"] = name, kwargs
        return tokenizer(name, *args, **kwargs)

    def then(name, *_, **kwargs):
        seen["model"] = name, kwargs
        raise LoadedError

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", first)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", then)
    return seen


def test_every_command_is_here():
    assert {words[0] for words in COMMAND_WORDS.values()} == {"fit", "evaluate", *COMMANDS} - LOADS_NONE
    for name, command in COMMANDS.items():
        assert ("loading" in signature(command).parameters) == (name not in LOADS_NONE)
        texts = re.findall(r"^ +loading: (.*)$", command.__doc__, re.MULTILINE)
        assert texts == ([] if name in LOADS_NONE else ["--loading.NAME, how a model is loaded."])


@pytest.mark.parametrize("name", COMMAND_WORDS)
def test_the_options_reach_model_and_tokenizer(name, asked):
    with pytest.raises(LoadedError):
        main([*COMMAND_WORDS[name], *WORDS, "--trust_remote_code"])
    for part in ("model", "tokenizer"):
        place, kwargs = asked[part]
        assert place == "repository"
        assert {each: kwargs.get(each) for each in ("revision", "subfolder", "token")} == {
            each: OPTIONS[each] for each in ("revision", "subfolder", "token")
        }
        assert kwargs["trust_remote_code"] is True
    assert asked["model"][1]["attn_implementation"] == "eager"


@pytest.mark.parametrize("name", COMMAND_WORDS)
def test_a_type_and_devices_are_the_models_alone(name, asked):
    words = ["--loading.dtype=float16", "--loading.device_map", "auto", "--loading.subfolder=part"]
    with pytest.raises(LoadedError):
        main([*COMMAND_WORDS[name], *words])
    assert (asked["model"][1]["dtype"], asked["model"][1]["device_map"]) == ("float16", "auto")
    assert asked["model"][1]["trust_remote_code"] is False
    assert {"dtype", "device_map", "token"}.isdisjoint(asked["tokenizer"][1])


def test_a_run_keeps_the_revision_and_no_token(asked, monkeypatch, finished, capsys):
    """The model is there in this test; the folder has no other revision than what is in it."""
    monkeypatch.undo()
    monkeypatch.chdir(finished)
    monkeypatch.setattr(sys, "argv", ["cakeflow"])
    method = ["--model.targets.steps", "1", "--model.contexts.groups", "[['{}']]", "--model.statistics.source",
              "corpus.txt", "--model.statistics.tokens", "1200", "--data.limit", "1"]  # fmt: skip
    other = ["--model.model_kwargs", "{'token': 'hf_other'}"]
    main([*COMMAND_WORDS["fit"], *method, *other, *WORDS, "--run_dir", "kept"])
    files = [path.read_bytes() for path in Path("kept").rglob("*") if path.is_file()]
    assert not any(b"hf_secret" in each or b"hf_other" in each for each in files)
    config = Path("kept/config.yaml").read_text()
    assert "revision: v1" in config
    assert "subfolder: part" in config
    ledger = Path("kept/journal/ledger.jsonl").read_text()
    assert '"loading":{"attn_implementation":"eager","revision":"v1","subfolder":"part"}' in ledger
    assert "hf_secret" not in capsys.readouterr().out


def test_a_resumed_command_is_shown_without_the_token():
    words = ["fit", "--loading.token", "hf_secret", "--data", "builtin", "--loading.revision=v1"]
    assert without_token(words) == ["fit", "--data", "builtin", "--loading.revision=v1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--loading.revison", "v1"], "did you mean 'revision'"),
        (["--loading", "v1"], "expected --loading.revision"),
        (["--loading.token"], "--loading.token needs a value"),
        (["--loading.token", "--data"], "--loading.token needs a value"),
        (["--loading.trust_remote_code=true"], "expected --loading.revision"),
    ],
)
def test_what_is_no_option_is_named(words, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        take_loading(["fit", *words])


def test_the_pages_name_them(capsys):
    for name in {words[0] for words in COMMAND_WORDS.values()}:
        with pytest.raises(SystemExit) if name in COMMANDS and name != "edit" else no_error():
            script([name, "--help"])
        assert "--loading" in capsys.readouterr().out, name


def no_error():
    from contextlib import nullcontext

    return nullcontext()
