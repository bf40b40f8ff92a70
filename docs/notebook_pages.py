"""Hook of mkdocs: the notebooks are pages of the site, with the outputs that they had when ``tests/pages.py`` ran them.

They are stored without outputs. A copy with outputs in ``build/notebooks`` is shown if it has the very cells of the
notebook; without one the page has the cells alone.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter
from nbformat import NotebookNode

EXECUTED = Path(__file__).parents[1] / "build" / "notebooks"
"""Where ``tests/pages.py`` leaves what it ran."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put a page in the place of every notebook, and its pictures beside it."""
    for file in [each for each in files if each.src_uri.endswith(".ipynb") and each.abs_src_path]:
        path = Path(str(file.abs_src_path))
        text, pictures = page_of(_latest(path), path.stem)
        files.remove(file)
        files.append(File.generated(config, f"{file.src_uri.removesuffix('.ipynb')}.md", content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, f"{Path(file.src_uri).parent.as_posix()}/{name}", content=content))
    return files


def page_of(notebook: NotebookNode, stem: str) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and its pictures by their names in it, which begin with ``stem``.

    Progress bars and warnings are left out.
    """
    for cell in notebook.cells:
        cell.update(outputs=[each for each in cell.get("outputs", ()) if each.get("name") != "stderr"])
    options = {"output_files_dir": "", "unique_key": stem}
    text, resources = MarkdownExporter().from_notebook_node(notebook, resources=options)
    return text, dict(resources["outputs"] or {})


def _latest(path: Path) -> NotebookNode:
    """The notebook as it was run, if it was not changed since; else as it is stored."""
    stored, executed = nbformat.read(path, as_version=4), EXECUTED / path.name
    if executed.exists():
        run = nbformat.read(executed, as_version=4)
        if [cell.source for cell in run.cells] == [cell.source for cell in stored.cells]:
            return run
    return stored
