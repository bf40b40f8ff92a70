"""Plugins are found, checked and named; each way to be unusable has its message."""

import gc
import sys
from importlib.metadata import EntryPoint

import pytest
from cakeflow_restrain import Rect

from cakeflow import plugins
from cakeflow.cli.command_line import run_command as main
from cakeflow.core.config import build_module
from cakeflow.errors import PluginError
from cakeflow.plugins import GROUP, find_plugins, load_plugins

OURS = {
    "IntegratedGradients": "attribution", "Noisy": "weighter", "Prune": "solver", "Rect": "solver",
    "Saliency": "attribution", "Shuffled": "weighter",
}  # fmt: skip
MODULE = """
from dataclasses import dataclass
from cakeflow import LeastSquares, ShareAllocator, Uniform
from cakeflow.core import EditCallback
from cakeflow.targets import GradientSearch, LossBelow, NormDecay

@dataclass(frozen=True)
class Rising(Uniform): pass
class Watching(EditCallback): pass
class Calm(GradientSearch): pass
class Price(NormDecay): pass
class Soon(LossBelow): pass
class Unfinished(ShareAllocator): residual_at = "last"
class LeastSquares(LeastSquares): pass
class Stranger: pass
number = 3
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Entry points of a package that is not really installed."""
    (tmp_path / "mylab.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("import something_that_is_not_there")
    monkeypatch.syspath_prepend(str(tmp_path))

    def add(*entries):
        made = [EntryPoint(name, value, GROUP) for name, value in entries]
        real = plugins.entry_points
        monkeypatch.setattr(plugins, "entry_points", lambda group: [*real(group=group), *made])

    yield add
    sys.modules.pop("mylab", None)
    gc.collect()  # a class lives until then, and its name would be ambiguous in the configs of later tests


def test_ours_come_through_the_same_door():
    result = {plugin.name: plugin for plugin in load_plugins()}
    assert {name: result[name].slot for name in OURS} == OURS
    assert all(result[name].package.startswith("cakeflow ") for name in OURS)


def test_a_config_names_a_plugin_by_its_class(tmp_path):
    path = tmp_path / "method.yaml"
    path.write_text("model: {layers: [1], solver: {class_path: Rect, init_args: {keep: 0.3}}}")
    assert build_module([path]).solver == Rect(keep=0.3)


def test_others_are_found(install):
    slots = {"Rising": "weighter", "Watching": "callback", "Calm": "targets", "Price": "objective", "Soon": "stop"}
    install(*((name, f"mylab:{name}") for name in slots))
    result = {plugin.name: plugin for plugin in load_plugins()}
    assert {name: result[name].slot for name in slots} == slots
    assert result["Rising"].path == "mylab:Rising"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("Gone", "mylab:Gone", "cannot be imported: AttributeError"),
        ("Broken", "broken:Broken", "cannot be imported: ModuleNotFoundError.*something_that_is_not_there"),
        ("Stranger", "mylab:Stranger", "not a subclass of any of cakeflow.weighters.base.Weighter"),
        ("number", "mylab:number", "not a subclass"),
        ("Unfinished", "mylab:Unfinished", "does not define shares"),
        ("Going", "mylab:Rising", "its class is called Rising"),
        ("LeastSquares", "mylab:LeastSquares", "another one has the same name"),
        ("Rect", "mylab:Rising", "its class is called Rising"),
    ],
)
def test_what_cannot_be_used_is_named_with_the_reason(install, name, value, words):
    install((name, value))
    with pytest.raises(PluginError, match=rf"plugin {name} \({value}, from an unknown package\): .*{words}"):
        load_plugins()
    (mine,) = [plugin for plugin in find_plugins() if plugin.path == value]
    assert mine.problem


def test_two_of_one_name_are_both_named(install):
    install(("Rising", "mylab:Rising"), ("Rising", "mylab:Rising"))
    with pytest.raises(PluginError) as caught:
        load_plugins()
    assert str(caught.value).count("plugin Rising (mylab:Rising") == 2


def test_the_command_lists_them_and_then_says_what_is_wrong(install, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert {plugin.name for plugin in main(["plugins"])} >= set(OURS)
    install(("Gone", "mylab:Gone"))
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(["plugins"])
    printed = capsys.readouterr()
    assert all(name in printed.out for name in OURS)
    assert "Gone" in printed.err


def test_nothing_is_edited_beside_a_broken_plugin(install):
    install(("Gone", "mylab:Gone"))
    with pytest.raises(PluginError, match="plugin Gone"):
        build_module([])
