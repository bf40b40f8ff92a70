"""The runner of the documentation's commands, and what the pages must name."""

import base64
import importlib.util
import re
from pathlib import Path

import pytest
from pages import DOCS, PageError, blocks, check, main

from cakeflow import metrics
from cakeflow.core import shipped
from cakeflow.journal.schema import BODIES


@pytest.fixture
def page(tmp_path):
    """Writes a page."""

    def write(text):
        path = tmp_path / "page.md"
        path.write_text(text)
        return path

    return write


def fence(language, code, note=""):
    return f"{f'<!-- {note} -->' if note else ''}\n```{language}\n{code}\n```\n".lstrip("\n")


def test_blocks_go_on_from_each_other(page):
    text = fence("python", "x = 2") + "Words.\n\n" + fence("python", "print(x + 1)") + fence("text", "3", "output")
    assert check(page(text)) == 2
    assert [(block.line, block.language) for block in blocks(text)] == [(1, "python"), (6, "python"), (10, "text")]


def test_bash_writes_files_that_python_reads(page):
    text = fence("bash", "cat > a.txt <<'END'\nhere\nEND") + fence(
        "python", "from pathlib import Path\nprint(Path('a.txt').read_text())"
    )
    assert check(page(text + fence("text", "here", "output"))) == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (fence("python", "x = 1\nraise ValueError('bad')"), "line 1: ValueError: bad"),
        (fence("python", "import sys; sys.exit(3)"), "SystemExit: 3"),
        (fence("bash", "false | cat"), "exit status 1"),
        (fence("bash", "echo a\nls no_such_file\necho b"), "no_such_file"),
        (fence("bash", "cakeflow no_such_command"), "exit status 2"),
        (fence("python", "print(1)") + fence("text", "2", "output"), "line 5: should print"),
        (fence("python", "x = 1", "fails"), "should end with an error"),
        (fence("python", "class TestX:\n    def test_a(self):\n        assert 1 == 2, 'no'"), "AssertionError: no"),
        (fence("ruby", "puts 1"), "unknown language 'ruby'"),
        ("```python\nx = 1\n", "a fence that is not closed"),
        ("  ```python\n  x = 1\n  ```\n", "indented"),
        ("```\nx = 1\n```\n", "no language"),
    ],
)
def test_what_a_page_says_wrongly_is_an_error(page, text, reason):
    with pytest.raises(PageError, match=re.escape(reason)):
        check(page(text))


def test_what_is_not_run_has_a_reason(page):
    assert check(page(fence("bash", "false", "not run: needs a GPU"))) == 0
    with pytest.raises(PageError, match="exit status 1"):
        check(page(fence("bash", "false", "not run")))


def test_an_error_that_is_meant_is_what_was_printed(page):
    text = fence("python", "1 / 0", "fails") + fence("text", "division by zero", "output")
    assert check(page(text)) == 1


def test_a_failing_page_is_the_exit_status(tmp_path, monkeypatch, capsys):
    (tmp_path / "good.md").write_text(fence("python", "x = 1"))
    (tmp_path / "bad.md").write_text(fence("python", "x = y"))
    monkeypatch.setattr("pages.DOCS", tmp_path)
    assert main(["good"]) == 0
    assert main([]) == 1
    assert main(["good", "lost"]) == 1
    assert "bad.md, line 1: NameError" in capsys.readouterr().out


def words(name):
    return set(re.findall(r"`([\w.]+)`", (DOCS / name).read_text(encoding="utf-8")))


def test_the_pages_name_every_recipe_metric_and_entry():
    assert set(shipped("method")) - words("methods.md") == set()
    assert set(metrics.__all__) - words("metrics.md") - {"fluency"} == set()
    assert set(BODIES) - words("formats.md") == set()


def test_every_page_is_in_the_navigation():
    navigation = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    missing = [name for path in DOCS.rglob("*.md") if (name := str(path.relative_to(DOCS))) not in navigation]
    assert missing == []


@pytest.fixture(scope="module")
def hook():
    """The hook that makes pages of notebooks."""
    pytest.importorskip("nbconvert")
    spec = importlib.util.spec_from_file_location("notebook_pages", DOCS / "notebook_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PICTURE = base64.b64encode(b"a picture").decode()


def executed(path):
    """A notebook as it was run: a text, a table and a picture."""
    nbformat = pytest.importorskip("nbformat")
    new = nbformat.v4
    data = [{"text/plain": "42"}, {"text/html": "<table>", "text/plain": "a table"}, {"image/png": PICTURE}]
    outputs = [new.new_output("execute_result", each, execution_count=1) for each in data]
    cells = [new.new_markdown_cell("# A tour"), new.new_code_cell("x = 1")]
    notebook = new.new_notebook(cells=cells, metadata={"language_info": {"name": "python"}})
    nbformat.write(notebook, path)
    notebook.cells[1].outputs = [new.new_output("stream", name="stderr", text="a bar"), *outputs]
    return notebook


def test_a_notebook_is_a_page_with_its_outputs(hook, tmp_path):
    text, pictures = hook.page_of(executed(tmp_path / "tour.ipynb"), "tour")
    assert text.startswith("# A tour\n")
    assert "a bar" not in text
    assert "```python\nx = 1\n```" in text
    assert "    42\n" in text
    assert "<table>" in text
    ((name, content),) = pictures.items()
    assert content == b"a picture"
    assert name.startswith("tour")
    assert f"]({name})" in text


def test_outputs_of_other_cells_are_not_shown(hook, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    notebook = executed(tmp_path / "tour.ipynb")
    monkeypatch.setattr(hook, "EXECUTED", tmp_path / "build")
    assert not hook._latest(tmp_path / "tour.ipynb").cells[1].outputs
    (tmp_path / "build").mkdir()
    nbformat.write(notebook, tmp_path / "build/tour.ipynb")
    assert len(hook._latest(tmp_path / "tour.ipynb").cells[1].outputs) == 4
    notebook.cells[1].source = "x = 2"
    nbformat.write(notebook, tmp_path / "build/tour.ipynb")
    assert not hook._latest(tmp_path / "tour.ipynb").cells[1].outputs


def test_every_notebook_is_in_the_navigation():
    navigation = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    names = [path.relative_to(DOCS).with_suffix(".md").as_posix() for path in DOCS.rglob("*.ipynb")]
    assert len(names) >= 2
    assert all(name in navigation for name in names)


def test_every_link_between_files_of_the_repository_leads_somewhere():
    root = Path(__file__).parents[1]
    for page in (root / "README.md", root / "CONTRIBUTING.md", *DOCS.rglob("*.md")):
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"
