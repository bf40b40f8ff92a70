"""Run every command of the documentation: the code blocks of the pages in docs/, and its notebooks.

    python tests/pages.py [PAGE ...]

The blocks of a page run in their order in one process and one folder, empty but for a link to docs. A ``python`` block
continues those before it. In a ``bash`` block a line that begins with ``cakeflow`` calls the command in that process,
because an import takes seconds; a block with any other line goes to bash as a whole. A comment in front of a block says
what is special:

    <!-- not run: REASON -->    shown only
    <!-- output -->             a ``text`` block that the block before it printed, ``...`` for any text
    <!-- fails -->              a block that ends with an error

The tests of a class ``Test...`` that a ``python`` block defines are run, as pytest would.
"""

from __future__ import annotations

import doctest
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import warnings
from code import InteractiveInterpreter
from collections.abc import Iterator, Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
EXECUTED = DOCS.parent / "build" / "notebooks"
"""Notebooks as they were run (``docs/notebook_pages.py`` shows them)."""
BLOCK = re.compile(
    r"^(?:<!-- (?P<note>not run: [^\n]+|output|fails) -->\n)?"
    r"(?P<fence>```)(?P<language>\w+)[^\n]*\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
RUNS = ("python", "bash")
SHOWN = ("text", "yaml", "json", "toml")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class PageError(AssertionError):
    """A block that does not do what its page says."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its first line in the page, its language, its code and the comment in front of it."""

    line: int
    language: str
    code: str
    note: str = ""

    @property
    def is_run(self) -> bool:
        """True if the block is run."""
        return self.language in RUNS and not self.note.startswith("not run")


@dataclass
class Session:
    """The process of a page: names of its Python blocks, and what the last block printed."""

    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    printed: str = ""

    def run(self, block: Block) -> None:
        """Run a block, and keep what it printed."""
        stream = io.StringIO()
        with redirect_stdout(stream), redirect_stderr(io.StringIO()):
            if block.language == "python":
                self._python(block.code)
            else:
                self._shell(block.code, stream)
        self.printed = stream.getvalue()

    def _python(self, code: str) -> None:
        known = set(self.names)
        interpreter = _Interpreter(self.names)
        interpreter.runcode(compile(code, "<page>", "exec"))
        if interpreter.error is not None:
            raise interpreter.error
        for name in sorted(set(self.names) - known):
            if name.startswith("Test"):
                _run_tests(self.names[name])

    def _shell(self, code: str, stream: io.StringIO) -> None:
        lines = [line for line in code.replace("\\\n", " ").splitlines() if line.strip() and line[0] != "#"]
        if all(line.startswith("cakeflow ") and not set("|<>;&$") & set(line) for line in lines):
            for line in lines:
                _command(shlex.split(line, comments=True)[1:])
            return
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", code], capture_output=True, text=True, env=environment)
        stream.write(done.stdout)
        if done.returncode:
            raise PageError(f"exit status {done.returncode}: {done.stderr[-800:]}")


class _Interpreter(InteractiveInterpreter):
    """Keeps the error of a block instead of printing it."""

    error: BaseException | None = None

    def showtraceback(self) -> None:
        self.error = sys.exc_info()[1]


def _run_tests(cases: type) -> None:
    """Run the tests of a class."""
    for name in [name for name in dir(cases) if name.startswith("test_")]:
        getattr(cases(), name)()


def _command(words: Sequence[str]) -> None:
    """Call the command in this process."""
    from cakeflow.__main__ import main

    try:
        main(words)
    except SystemExit as end:
        if end.code:
            raise PageError(f"cakeflow {shlex.join(words)}: exit status {end.code}") from end


def blocks(text: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page."""
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("fence")) + 1
        yield Block(line, match["language"], match["code"], match["note"] or "")


def check(page: Path) -> int:
    """Run a page in the current folder and return the number of blocks that were run.

    Raises:
        PageError: Naming page and line of a block that does not do what the page says, or whose language is unknown.
    """
    session, count = Session(), 0
    text = page.read_text(encoding="utf-8")
    listed = list(blocks(text))
    if sum(line.lstrip().startswith("```") for line in text.splitlines()) != 2 * len(listed):
        raise PageError(f"{page.name}: a fence that is not closed, is indented or has no language")
    for block in listed:
        try:
            count += block.is_run
            _check(block, session)
        except PageError as error:
            raise PageError(f"{page.name}, line {block.line}: {error}") from error
    return count


def _check(block: Block, session: Session) -> None:
    if block.note == "output":
        _compare(block.code, session.printed)
    elif not block.is_run:
        if block.language not in (*RUNS, *SHOWN):
            raise PageError(f"unknown language {block.language!r}; known: {', '.join((*RUNS, *SHOWN))}")
    elif block.note == "fails":
        _require_failure(block, session)
    else:
        try:
            session.run(block)
        except PageError:
            raise
        except BaseException as error:
            raise PageError(f"{type(error).__name__}: {error}") from error


def _require_failure(block: Block, session: Session) -> None:
    try:
        session.run(block)
    except (Exception, SystemExit) as error:
        session.printed = str(error)
        return
    raise PageError("should end with an error, and does not")


def _compare(expected: str, printed: str) -> None:
    if not doctest.OutputChecker().check_output(expected, printed, FLAGS):
        raise PageError(f"should print\n{expected}\nand prints\n{printed}")


def check_notebook(path: Path, folder: Path) -> int:
    """Execute a notebook in a folder and return the number of its cells.

    Raises:
        PageError: If a cell ends with an error, or the notebook was stored with outputs.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError

    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if any(cell.outputs or cell.execution_count for cell in cells):
        raise PageError(f"{path.name}: clear its outputs before it is stored")
    client = NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.create_kernel_manager().transport = "ipc"  # no port that others on the machine could reach
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError) as error:
        raise PageError(f"{path.name}: {error}") from error
    EXECUTED.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, EXECUTED / path.name)  # for the site, which shows the outputs
    return len(cells)


def main(names: Sequence[str]) -> int:
    """Run the pages that are named, or all, one after another, and say how long each took; 1 if one fails."""
    sources = [path for path in sorted(DOCS.rglob("*")) if path.suffix in (".md", ".ipynb")]
    known = {path: {path.stem, path.name, path.relative_to(DOCS).as_posix()} for path in sources}
    if missing := [name for name in names if not any(name in each for each in known.values())]:
        sys.stdout.write(f"docs/ has no page {missing[0]}\n")
        return 1
    failed = 0
    for page in [path for path in sources if not names or known[path] & {*names}]:
        start = time.perf_counter()
        try:
            count = run_page(page)
        except PageError as error:
            failed, count = 1, 0
            sys.stdout.write(f"{error}\n")
        if count:
            sys.stdout.write(f"{page.relative_to(DOCS)}: {count} blocks, {time.perf_counter() - start:.0f} s\n")
        sys.stdout.flush()
    return failed


def run_page(page: Path) -> int:
    """Run a page or a notebook in a folder of its own and return the number of blocks that were run."""
    with tempfile.TemporaryDirectory() as folder, chdir(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Path("docs").symlink_to(DOCS)
        return check(page) if page.suffix == ".md" else check_notebook(page, Path(folder))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
