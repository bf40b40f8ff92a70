"""``python -m cakeflow``."""

import runpy
import subprocess
import sys
from importlib.metadata import version

import pytest

import cakeflow


def test_the_package_runs_as_the_command(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "cakeflow.__main__", raising=False)  # which other tests import
    monkeypatch.setattr(sys, "argv", ["cakeflow", "--version"])
    runpy.run_module("cakeflow", run_name="__main__")
    assert capsys.readouterr().out == f"cakeflow {cakeflow.__version__}\n"
    assert cakeflow.__version__ == version("cakeflow")


@pytest.mark.parametrize("words", [["-c", "import cakeflow"], ["-m", "cakeflow", "--help"]])
def test_the_package_and_its_main_page_do_not_load_torch(words):
    done = subprocess.run([sys.executable, "-X", "importtime", *words], capture_output=True, text=True, check=True)
    modules = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "cakeflow" in modules
    assert not modules & {"torch", "lightning", "transformers"}


def test_what_the_package_exports_is_there():
    for name in cakeflow.__all__:
        assert getattr(cakeflow, name).__name__ in (name, f"cakeflow.{name}")
    assert set(cakeflow.__all__) <= set(dir(cakeflow))


def test_a_bad_command_ends_it_with_status_2(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "cakeflow.__main__", raising=False)
    monkeypatch.setattr(sys, "argv", ["cakeflow", "ft"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("cakeflow", run_name="__main__")
    assert stop.value.code == 2
    assert "did you mean 'fit'?" in capsys.readouterr().err
