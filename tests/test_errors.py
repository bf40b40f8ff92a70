"""The family of errors."""

from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest

from cakeflow import errors
from cakeflow.errors import (
    ConfigError,
    EditError,
    Fault,
    LockedError,
    ModelChangedError,
    NumericalError,
    PluginError,
    PolicyError,
    RanksError,
    RequestError,
    did_you_mean,
    require_choice,
    require_count,
)

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
FAMILY = [kind for kind in KINDS if not issubclass(kind, Warning)]
PYTHON = {
    NumericalError: ArithmeticError, PluginError: ImportError, PolicyError: PermissionError,
    ModelChangedError: RuntimeError, LockedError: RuntimeError, RanksError: RuntimeError,
}  # fmt: skip


@pytest.mark.parametrize("kind", FAMILY)
def test_one_base_and_a_python_kind(kind):
    assert issubclass(kind, EditError)
    if kind is not EditError:
        assert issubclass(kind, PYTHON.get(kind, ValueError))


def test_problem_names_entry_field_value_and_remedy():
    assert str(Fault(3, "subject", " x", "strip it")) == "entry 3, subject = ' x': strip it"


@pytest.mark.parametrize(("size", "whole"), [(78, True), (79, False), (5000, False)])
def test_long_values_are_cut(size, whole):
    text = str(Fault(0, "prompt", "a" * size, "shorten it"))
    assert (repr("a" * size) in text) == whole
    assert ("..." in text) != whole
    assert text.endswith(": shorten it")
    assert len(text) < 130


def test_request_error_lists_all_problems():
    problems = [Fault(0, "a", 1, "x"), Fault(4, "b", None, "y")]
    error = RequestError(problems)
    assert error.faults == tuple(problems)
    assert str(error).splitlines() == [
        "2 problem(s) in the requests; nothing was changed:", "  entry 0, a = 1: x", "  entry 4, b = None: y",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", FAMILY)
def test_no_message_moves_the_cursor(kind):
    error = (
        RequestError([Fault(0, "x", "\x1b[2J", "y\x1b[8m")]) if kind is RequestError else kind("a\n  b\x1b[2J\u202e")
    )
    assert all(line.isprintable() for line in str(error).split("\n"))
    assert len(str(error).split("\n")) == 2


@pytest.mark.parametrize(
    ("platform", "line"),
    [("linux", "cakeflow report 'C:\\my run'"), ("darwin", "cakeflow report 'C:\\my run'"),
     ("win32", 'cakeflow report "C:\\my run"')],
)  # fmt: skip
def test_a_command_is_one_of_the_systems_shell(platform, line, monkeypatch):
    monkeypatch.setattr(errors, "sys", SimpleNamespace(platform=platform))
    assert errors.command_line(["report", "C:\\my run"]) == line


@pytest.mark.parametrize(
    ("value", "names", "end"),
    [
        ("caek", ["cake", "memit"], "; did you mean 'cake'?"),
        ("steps", ["steps", "stop"], ""),
        ("entirely else", ["cake", "memit"], ""),
        ("lat", ["last", "late", "first"], "; did you mean 'late' or 'last'?"),
        (3, ["30"], "; did you mean '30'?"),
        ("x", [], ""),
    ],
)
def test_near_names_are_proposed(value, names, end):
    assert did_you_mean(value, names) == end


def test_a_choice_proposes_the_nearest():
    with pytest.raises(
        errors.ConfigError, match="form must be one of exact, answer, got 'anser'; did you mean 'answer'"
    ):
        require_choice("form", "anser", Literal["exact", "answer"])


@pytest.mark.parametrize("value", [0, -1, 1.0, "1", None, True])
def test_what_is_no_count_is_named(value):
    with pytest.raises(ConfigError, match=f"size must be a whole number of at least 1, got {value!r}"):
        require_count("size", value, 1)
    require_count("size", 1, 1)
    require_count("size", np.int64(1), 1)
    require_count("size", None, 1, optional=True)
