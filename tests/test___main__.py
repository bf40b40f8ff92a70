"""``python -m cakeflow``."""

import runpy
import sys
from importlib.metadata import version

import pytest

import cakeflow


def test_the_package_runs_as_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cakeflow", "--version"])
    runpy.run_module("cakeflow", run_name="__main__")
    assert capsys.readouterr().out == f"cakeflow {cakeflow.__version__}\n"
    assert cakeflow.__version__ == version("cakeflow")


def test_a_bad_command_ends_it_with_status_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cakeflow", "ft"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("cakeflow", run_name="__main__")
    assert stop.value.code == 2
    assert "did you mean 'fit'?" in capsys.readouterr().err
