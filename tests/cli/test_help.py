"""The help pages: one screen each, and every option on them is one."""

import re
from contextlib import suppress
from inspect import signature
from pathlib import Path

import pytest

from cakeflow.__main__ import main
from cakeflow.cli.command_line import _Trainer
from cakeflow.cli.help import FIRST, PAGES
from cakeflow.cli.runs import COMMANDS
from cakeflow.core.config import shipped

SCREEN = (40, 80)
"""Lines and columns."""
VALUES = {
    "run_dir": "runs/x", "data.limit": "3", "data.batch_size": "2", "data.eval_batch_size": "2", "model.layers": "[1]",
    "model.repairs": "1", "model.rounds": "1", "model.dtype": "bfloat16", "model.statistics.source": "corpus.txt",
    "model.statistics.tokens": "4096", "model.evaluation.protocol": "official", "trainer.accelerator": "cpu",
    "trainer.logger": "CSVLogger", "import": "json", "method": "cake", "model": "smollm2-135m", "data": "builtin",
    "loading.revision": "v1", "config": str(shipped("method")["cake"]), "targets": "short", "from": "runs/y",
    "model_config": "smollm2-135m",
}  # fmt: skip


def page(words, capsys):
    with suppress(SystemExit):  # the pages of the parsers
        main(words)
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


@pytest.mark.parametrize("words", [[], ["--help"], *([name, "--help"] for name in (*PAGES, *COMMANDS)), ["fit", "-h"]])
def test_a_page_fits_a_screen(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(SCREEN[1]))
    lines = page(words, capsys).splitlines()
    assert "usage: cakeflow" in "\n".join(lines)
    assert len(lines) <= SCREEN[0]
    assert max(map(len, lines)) <= SCREEN[1]


def test_the_main_page_has_every_command_once_with_what_its_docstring_begins_with(capsys):
    text = page([], capsys)
    assert text == page(["--help"], capsys)
    lines = dict(re.findall(r"^  ([a-z]+) +([A-Z].*)$", text, re.MULTILINE))
    docstrings = {"fit": _Trainer.fit.__doc__, "evaluate": _Trainer.evaluate.__doc__}
    docstrings |= {name: command.__doc__ for name, command in COMMANDS.items()}
    assert lines == {name: re.split(r"[:;,]|\.$", text.split("\n")[0])[0] for name, text in docstrings.items()}


@pytest.mark.parametrize("command", ["fit", "evaluate"])
def test_every_option_on_a_page_is_one(command, capsys):
    text = page([command, "--help"], capsys)
    options = {*re.findall(r"--([a-z_.]*[a-z])", text)} - {"help_all", "model.help", "trust_remote_code", "strict"}
    words = [word for name in sorted(options) for word in (f"--{name}", VALUES[name])]
    printed = page([command, *words, "--trust_remote_code", "--print_config"], capsys)
    assert "layers:" in printed
    for kind in ("model", "targets", "data"):
        assert all(name in text for name in shipped(kind))


@pytest.mark.parametrize("command", ["fit", "evaluate"])
def test_every_method_is_on_the_page_or_in_the_list_that_it_names(command, capsys, monkeypatch):
    text = " ".join(page([command, "--help"], capsys).split())
    rest = len(shipped("method")) - len(FIRST["method"])
    assert f"--method NAME {', '.join(FIRST['method'])}; {rest} more: cakeflow recipes; or a YAML file" in text
    monkeypatch.setenv("COLUMNS", str(SCREEN[1]))
    main(["recipes"])
    lines = capsys.readouterr().out.splitlines()
    named = [line.split(maxsplit=1) for line in lines[: len(shipped("method"))]]
    assert [name for name, _ in named] == [*shipped("method")]
    assert set(FIRST["method"]) < set(shipped("method"))


def test_a_page_fits_however_many_methods_there_are(capsys, monkeypatch):
    methods = {**shipped("method"), **{f"method_{i}": None for i in range(1000)}}
    monkeypatch.setattr("cakeflow.core.config.shipped", lambda kind: methods if kind == "method" else shipped(kind))
    lines = page(["fit", "--help"], capsys).splitlines()
    assert any(f"{len(methods) - len(FIRST['method'])} more: cakeflow" in line for line in lines)
    assert len(lines) <= SCREEN[0]


def test_the_page_of_edit_has_the_arguments_of_its_function(capsys):
    options = {*re.findall(r"^  --([a-z_]+)", page(["edit", "--help"], capsys), re.MULTILINE)}
    assert options - {"from"} == {*signature(COMMANDS["edit"]).parameters} - {"texts", "from_run"}


def test_the_full_list_is_longer_and_names_every_option(capsys):
    text = page(["fit", "--help_all"], capsys)
    assert len(text.splitlines()) > 200
    assert "--trainer.profiler" in text
    assert "--model.help" in text


@pytest.mark.parametrize("words", [["--config", "trust.yaml"], ["--config=trust.yaml"]])
def test_no_config_file_of_a_plain_command_lets_foreign_code_run(words, tmp_path, capsys):
    (tmp_path / "trust.yaml").write_text("loading: {trust_remote_code: true}")
    with pytest.raises(SystemExit):
        main(["trace", *words])
    assert "may not let foreign code run" in " ".join(capsys.readouterr().err.split())


def test_aliases_in_a_config_file_of_a_plain_command_are_bounded(tmp_path, capsys, monkeypatch):
    """Nothing walks through what they expand to: 9 levels of nine aliases are 400 million entries."""
    monkeypatch.chdir(tmp_path)
    levels = "\n".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 9))
    Path("bomb.yaml").write_text(f"l0: &l0 [0, 0, 0, 0, 0, 0, 0, 0, 0]\n{levels}\n")
    with pytest.raises(SystemExit):
        main(["trace", "--config", "bomb.yaml"])
    assert "aliases expand" in " ".join(capsys.readouterr().err.split())
