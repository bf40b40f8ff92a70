"""The list of shipped methods: all of them, a line each, with what their files say first."""

import pytest

from cakeflow.cli.command_line import run_command as main
from cakeflow.cli.recipes import summary
from cakeflow.core.config import shipped


@pytest.mark.parametrize("columns", [80, 200])
def test_every_method_has_a_line(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["recipes"]) == [*shipped("method")]
    *lines, empty, folder = capsys.readouterr().out.splitlines()
    assert empty == ""
    assert str(shipped("method")["cake"].parent) in folder
    for line, (name, path) in zip(lines, shipped("method").items(), strict=True):
        first, said = line.split(maxsplit=1)
        assert first == name
        assert len(line) <= columns
        assert summary(path).startswith(said.removesuffix(" ..."))


def test_a_summary_is_the_first_sentence_without_sources(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "# Mine (Ann et al. 2026, eq. 3.1): half of\n# it; the rest. More.\nmodel: {layers: [1]}  # not this\n"
    )
    assert summary(path) == "Mine: half of it"
    path.write_text("model: {layers: [1]}\n")
    assert summary(path) == ""


def test_every_summary_says_something():
    assert all(len(summary(path).split()) >= 3 for path in shipped("method").values())
