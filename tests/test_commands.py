"""Every script that a document names is there, and takes the options that it is shown with: figures have commands."""

import argparse
import importlib.util
import re
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = [ROOT / "benchmarks", ROOT / "benchmarks/reproduce", ROOT / "benchmarks/reproduce/fashion"]
FOLDERS = [ROOT, *BENCHMARKS, ROOT / "cakeflow", ROOT / "plugins", *(ROOT / "cakeflow").iterdir()]
DOCUMENTS = sorted(
    [
        *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")),
        *(path for path in ROOT.glob("benchmarks/**/*.md") if "results" not in path.parts),
        *ROOT.glob("docs/**/*.md"),
    ]
)
SPAN = re.compile(r"`(python )?([\w/.-]+\.py)((?: [^`]*)?)`|^ *python ((?:benchmarks|tests)/[\w/]+\.py)(.*)$", re.M)
CELLS = re.compile(r"^\| `([\w/]+\.py)` \| `(--[^`]*)`", re.M)
PLACEHOLDERS = {"...", "TABLE", "FIGURE"}
"""Words that stand for something that a parser checks."""
OWN = re.compile(r"NAME|ROOM|^mylab\.py$|^conftest\.py$")
"""Names of files that a reader has or makes."""


class ParsedError(Exception):
    """The options were taken."""


def commands():
    """Script, options, and whether it is a whole command, of each command in a document; equal ones once."""
    known = set()
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8").replace("\\\n", " ")
        lines = [(m[2] or m[4], m[3] or m[5] or "", bool(m[1] or m[4])) for m in SPAN.finditer(text)]
        for script, options, whole in [*lines, *((*match.groups(), True) for match in CELLS.finditer(text))]:
            words = options.partition("  #")[0].replace(" JSON", " {}").strip()
            if (script, words) not in known and not OWN.search(script):
                known.add((script, words))
                name = f"{document.relative_to(ROOT)}: {script} {words}"
                yield pytest.param(script, words, whole, id=name.replace("\n", " ")[:150])


def path_of(script):
    """The script's file."""
    paths = [folder / script for folder in FOLDERS if (folder / script).is_file()]
    assert paths, f"{script} is not there"
    return paths[0]


@cache
def loaded(path):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(f"command_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ALL = [*commands()]


def test_there_are_commands():
    assert sum(bool(each.values[1]) for each in ALL) > 40


@pytest.mark.parametrize(("script", "options", "whole"), ALL)
def test_a_script_is_there_and_takes_the_options_that_it_is_shown_with(script, options, whole, monkeypatch, capsys):
    path, words = path_of(script), shlex.split(options)
    if path.parent not in BENCHMARKS or not words or PLACEHOLDERS & {*words}:
        return
    parse = argparse.ArgumentParser.parse_args

    def stop(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    for folder in BENCHMARKS:
        monkeypatch.syspath_prepend(str(folder))
    with pytest.raises((ParsedError, SystemExit)) as end:
        loaded(path).main()
    error = capsys.readouterr().err
    assert end.type is ParsedError or (not whole and "the following arguments are required" in error), error
