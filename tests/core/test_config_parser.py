"""Configs are data: what a file can name, what it can give, and that nothing else gets through."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, get_args

import jsonargparse
import lightning as L
import pytest
import torch
from jsonargparse import Namespace, capture_parser
from jsonargparse._typehints import ActionTypeHint, accepts_any_value
from torch import Tensor, nn

from cakeflow import LeastSquares, Statistics
from cakeflow.cli.command_line import COMMANDS, run_command, with_trust
from cakeflow.core.config import build_module
from cakeflow.core.config_parser import (
    LIGHTNING,
    PACKAGES,
    SLOT_BASES,
    ConfigParser,
    Plain,
    _Absent,
    import_words,
    only_known_classes,
    plain,
    settable,
)
from cakeflow.errors import ConfigError, EditError
from cakeflow.models import LanguageModel
from cakeflow.plugins import plugin_packages, subclasses


@dataclass(frozen=True)
class Mine(LeastSquares):
    """A solver of the test's own."""


class Watching(L.Callback):
    """A callback that no installed plugin has."""


@pytest.fixture
def config(tmp_path):
    """Write a config."""

    def write(values, name="run.yaml"):
        (tmp_path / name).write_text(values if isinstance(values, str) else json.dumps(values))
        return tmp_path / name

    return write


@pytest.fixture(autouse=True)
def nothing_loads(monkeypatch):
    """A command that gets as far as the model ends there."""

    def refuse(name, **_):
        raise ConfigError(f"{name} is loaded now")

    monkeypatch.setattr("cakeflow.evaluation.evaluation.load_model", refuse)


@pytest.fixture
def module_on_path(tmp_path, monkeypatch):
    """A module that leaves a file when it is imported."""
    (tmp_path / "untouched_module.py").write_text(
        f"open({str(tmp_path / 'imported')!r}, 'w').close()\nfrom cakeflow import LeastSquares\n"
        "class Mine(LeastSquares): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "imported"
    sys.modules.pop("untouched_module", None)


# ---- no setting takes any value ----


def parts(hint):
    """A type and all types in it."""
    return [hint, *(inner for part in get_args(hint) for inner in parts(part))]


def settings(parser, place, visited):
    """Place and type of every argument of a parser, and of every class that can be named in it."""
    for action in parser._actions:
        if isinstance(action, ActionTypeHint):
            yield f"{place}{action.dest}", action._typehint
            for kind in [part for part in parts(action._typehint) if isinstance(part, type)]:
                if kind not in visited and issubclass(kind, (*SLOT_BASES, *LIGHTNING)):
                    visited.add(kind)
                    for child in {kind, *subclasses(kind)}:
                        if child.__module__.split(".")[0] in {*PACKAGES, *plugin_packages()}:
                            inner = type(parser)(exit_on_error=False)
                            with suppress(ValueError):  # a class that needs what no config can give
                                inner.add_class_arguments(child, fail_untyped=False)
                            yield from settings(inner, f"{child.__name__}.", visited)
        elif action.type is not None:
            yield f"{place}{action.dest}", action.type


def parsers():
    """The parser of every command, by its name."""
    (commands,) = [a for a in capture_parser(run_command, ["fit"])._actions if a.dest == "subcommand"]
    return dict(commands.choices) | {name: capture_parser(run_command, [name]) for name in COMMANDS}


def test_no_command_has_a_setting_of_any_type_or_a_function():
    places, visited = {}, set()
    for command, parser in parsers().items():
        places |= dict(settings(parser, f"{command}.", visited))
    loose = [
        place
        for place, hint in places.items()
        if any(
            accepts_any_value(part) or ActionTypeHint.is_callable_typehint(part) or part is type for part in parts(hint)
        )
    ]
    assert not loose
    assert len(visited) > 10
    assert {"fit.data.source", "LocateThenEdit.model_kwargs", "GeneralAbility.data", "NeutralText.source"} <= set(
        places
    )
    assert "ModelCheckpoint.dirpath" in places
    assert not {"LocateThenEdit.moments", "fit.trainer.plugins", "LambdaCallback.setup"} & set(places)


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        (Any, Plain),
        (object, Plain),
        (dict, dict[str, Plain]),
        (list, list[Plain]),
        (dict[str, Any] | None, dict[str, Plain] | None),
        (str | Mapping[int, object], str | Mapping[int, Plain]),
        (tuple[int, ...], tuple[int, ...]),
        (Literal["a"] | None, Literal["a"] | None),
        (Callable[[], int], _Absent),
        (str | Callable, str),
        (type[int] | None, _Absent),
        (Mapping[int, Tensor] | None, _Absent),
        (str | LanguageModel, str),
        (nn.Module, _Absent),
        (Sequence[LeastSquares], Sequence[LeastSquares]),
        (Iterable[L.Callback] | bool, Iterable[L.Callback] | bool),
        (Statistics, Statistics),
        (L.Trainer, _Absent),
        (torch.device | str, str),
        (NoneType, NoneType),
    ],
)
def test_the_settable_part_of_a_type(kind, part):
    assert settable(kind) == part


def test_data_names_no_class():
    data = {"a": [1, {"b": None}], "c": "class_path"}
    assert plain(data) == data
    for bad in ({"class_path": "x.Y"}, [{"a": {"class_path": 1, "init_args": {}}}]):
        with pytest.raises(ValueError, match="only data can stand here"):
            plain(bad)


# ---- what a file cannot do ----

SHELL = {"class_path": "subprocess.Popen", "init_args": {"args": "touch marker", "shell": True}}
PLACES = {
    "statistics.source": {"statistics": {"source": SHELL}},
    "deep in model_kwargs": {"model_kwargs": {"a": {"b": [SHELL]}}},
    "moments": {"moments": {1: SHELL}},
    "base": {"base": SHELL},
    "a part": {"solver": SHELL},
    "a part by its path": {"solver": "subprocess.Popen"},
    "a part as text": {"solver": json.dumps(SHELL)},
    "inside a part": {"weighter": {"class_path": "Scores", "init_args": {"attribution": SHELL}}},
    "arguments beside the signature": {"solver": {"class_path": "Rect", "dict_kwargs": {"inner": SHELL}}},
    "a metric": {"metrics": [SHELL]},
    "an argument of a metric": {"metrics": [{"class_path": "Efficacy", "init_args": {"form": SHELL}}]},
    "the module": {"class_path": "subprocess.Popen"},
}


@pytest.mark.parametrize("part", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("mode", ["file", "nested file"])
def test_a_config_builds_no_other_class(config, monkeypatch, tmp_path, part, mode):
    model = part if "class_path" in part else {"layers": [1], **part}
    if mode == "nested file":
        model = str(
            config(
                model if "class_path" in model else {"class_path": "LocateThenEdit", "init_args": model}, "inner.yaml"
            )
        )
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: (tmp_path / "marker").touch())
    with pytest.raises(ConfigError):
        build_module([config({"model": model})])
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "trainer",
    [
        {"callbacks": [SHELL]},
        {"callbacks": [f"{__name__}.Watching"]},
        {"callbacks": ["Watching"]},
        {"callbacks": [{"class_path": "LambdaCallback", "init_args": {"setup": "os.system"}}]},
        {"callbacks": [{"class_path": "cakeflow.editor.with_progress_bar"}]},
        {"logger": "cakeflow.editor.default_logger"},
        {"logger": [SHELL]},
        {"callbacks": ["SaveConfigCallback"]},
        {"callbacks": [{"class_path": "ModelCheckpoint", "dict_kwargs": {"unknown": SHELL}}]},
        {"profiler": SHELL},
        {"strategy": SHELL},
        {"accelerator": {"class_path": "lightning.pytorch.accelerators.CPUAccelerator"}},
        {"plugins": [{"class_path": "lightning.pytorch.plugins.io.TorchCheckpointIO"}]},
        {"default_root_dir": SHELL},
    ],
)
def test_a_trainer_gets_no_other_class(config, monkeypatch, tmp_path, capsys, trainer):
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: (tmp_path / "marker").touch())
    with pytest.raises((SystemExit, EditError)) as stopped:
        run_command(["fit", f"--config={config({'model': {'base': 'nowhere', 'layers': [1]}, 'trainer': trainer})}"])
    assert not isinstance(stopped.value, SystemExit) or stopped.value.code == 2
    assert "nowhere is loaded now" not in " ".join(
        capsys.readouterr().err.split()
    )  # refused before the model is loaded
    assert not (tmp_path / "marker").exists()
    assert not (tmp_path / "runs").exists()


def test_a_config_imports_no_module(config, module_on_path):
    path = config({"model": {"layers": [1], "solver": {"class_path": "untouched_module.Mine"}}})
    with pytest.raises(ConfigError, match="import the module in Python, or with --import NAME"):
        build_module([path])
    assert not module_on_path.exists()


def test_the_command_line_imports_a_module(config, module_on_path, capsys):
    path = config({"model": {"base": "nowhere", "layers": [1], "solver": {"class_path": "untouched_module.Mine"}}})
    with pytest.raises(SystemExit):
        run_command(["fit", f"--config={path}", "--import", "untouched_module"])
    assert module_on_path.exists()
    assert "nowhere is loaded now" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit):
        run_command(["fit", "--import=not_a_module_at_all"])
    assert "--import not_a_module_at_all: ModuleNotFoundError" in " ".join(capsys.readouterr().err.split())


# ---- what it can ----


def test_classes_that_were_imported_and_lightnings_own(config):
    assert isinstance(build_module([config({"model": {"layers": [1], "solver": f"{__name__}.Mine"}})]).solver, Mine)
    parser = ConfigParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[L.Callback])
    parser.add_argument("--config", action="config")
    kinds = {
        "ModelCheckpoint": {"dirpath": "x"},
        "EarlyStopping": {"monitor": "loss"},
        "cakeflow.callbacks.NeutralText": {"source": ["a", "b"]},
        "cakeflow.callbacks.StreamHealth": {"limits": {"kl": [0.2, 0.5]}, "every": 5},
    }
    named = [{"class_path": name, "init_args": values} for name, values in kinds.items()]
    with only_known_classes():
        made = parser.instantiate(parser.parse_args([f"--config={config({'callbacks': named})}"])).callbacks
    assert [type(each).__name__ for each in made] == ["ModelCheckpoint", "EarlyStopping", "NeutralText", "StreamHealth"]
    assert made[2].source == ["a", "b"]
    assert made[3].limits["kl"] == (0.2, 0.5)


def test_data_reaches_settings_as_it_stands(config):
    kwargs = {"device_map": {"": "cpu"}, "max_memory": {"0": "1GB"}, "deep": [1, {"a": [True, None, "1e-3"]}]}
    module = build_module(
        [config({"model": {"layers": [1], "model_kwargs": kwargs, "statistics": {"source": ["a.txt"]}}})]
    )
    assert {name: module._loading[name] for name in kwargs} == kwargs
    assert module.statistics.source == ["a.txt"]


def test_the_parser_of_other_programs_is_left_alone(config):
    build_module([config({"model": {"layers": [1]}})])
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--each", type=Watching)
    assert type(parser.instantiate(parser.parse_args([f"--each={__name__}.Watching"])).each) is Watching


# ---- trust ----


@pytest.mark.parametrize("name", ["trust_remote_code", "allow_all_kernels", "use_kernels"])
@pytest.mark.parametrize("value", [True, "yes", {"a": 1}])
def test_a_config_trusts_no_foreign_code(config, name, value):
    with pytest.raises(ConfigError, match=rf"{name} is .*say --{name} on the command line, or {name}=True in Python"):
        build_module([config({"model": {"layers": [1], "model_kwargs": {name: value}}})])


def test_python_and_the_command_line_can_trust(config, monkeypatch):
    assert build_module([], layers=[1], model_kwargs={"trust_remote_code": True})._loading["trust_remote_code"] is True
    loaded = []

    def load(*_, **kwargs):
        loaded.append(kwargs.get("trust_remote_code"))
        raise ConfigError("enough")

    monkeypatch.setattr("cakeflow.evaluation.evaluation.load_model", load)
    path = config({"model": {"base": "x", "layers": [1]}})
    for words in ([], ["--trust_remote_code"]):
        with pytest.raises(SystemExit):
            run_command(["fit", f"--config={path}", *words])
    with pytest.raises(SystemExit):
        run_command(["fit", f"--config={path}", "--model.model_kwargs.trust_remote_code", "true"])
    assert loaded == [None, True]


def test_trust_reaches_what_has_a_place_for_it():
    config = Namespace(
        a=[Namespace(trust_task_code=False, x=1)], b=Namespace(model_kwargs=None), c={"trust_task_code": 0}
    )
    trusted = with_trust(config, {"trust_task_code", "trust_remote_code"})
    assert trusted.a[0] == Namespace(trust_task_code=True, x=1)
    assert trusted.b.model_kwargs == {"trust_remote_code": True}
    assert trusted.c == config.c
    assert config.a[0].trust_task_code is False
    assert with_trust(config, ()) == config


# ---- aliases ----

BOMB = "\n".join([f"l{i}: &l{i} [{', '.join([f'*l{i - 1}' if i else 'x'] * 9)}]" for i in range(9)])
"""Nine lines that stand for 387 million texts."""


@pytest.mark.parametrize("text", [BOMB, json.dumps({"limit": BOMB}), "&a [*a]", "&a {b: [*a]}"])
def test_aliases_are_bounded(text, config, capsys):
    with pytest.raises(ConfigError):
        build_module([config(text)])
    with pytest.raises(SystemExit):
        run_command(["fit", f"--config={config(text)}"])


@pytest.mark.parametrize(
    ("configs", "words"),
    [
        ([{"solver": {"class_path": "LeastSquares"}}, {"callbacks": [{"class_path": "NeutralText"}]}], []),
        ([{"class_path": "cakeflow.solvers.NullSpace"}, {"class_path": "torchmetrics.MeanMetric"}, None, 3], []),
        (
            [[{"class_path": "mylab.parts.A", "init_args": {"inner": {"class_path": "other.B"}}}]],
            ["mylab.parts", "other"],
        ),
        ([{"a": {"class_path": "mylab.A"}}, {"b": {"class_path": "mylab.B"}}], ["mylab"]),
        ([{"class_path": "NotImported"}, {"class_path": 3}], []),
    ],
)
def test_words_that_import_the_modules_of_a_config(configs, words):
    assert import_words(*configs) == [word for each in words for word in ("--import", each)]


def test_the_module_of_an_imported_class_by_its_short_name():
    class OnlyHere(LeastSquares):
        """A solver with a name that no other class has."""

    assert import_words({"solver": {"class_path": "OnlyHere"}}) == ["--import", OnlyHere.__module__]
