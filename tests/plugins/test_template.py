"""The template as its reader uses it: built, installed into an environment of its own, named in a config."""

import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

TEMPLATE = Path(__file__).parents[2] / "plugins" / "template"
USE = """
import sys
from pathlib import Path
from cakeflow.__main__ import main
from cakeflow.core.config import build_module
module = build_module([Path("method.yaml")])
print(module.allocator, module.allocator.shares(__import__("torch").ones(3)).tolist())
sys.argv = ["cakeflow", "plugins"]
main()
"""


def run(*words, where):
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, cwd=where, capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A new environment that holds the template's wheel, and sees what the tests' environment has installed."""
    folder = tmp_path_factory.mktemp("template")
    source = folder / "source"
    shutil.copytree(TEMPLATE, source)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source), where=folder)
    run(sys.executable, "-m", "venv", str(folder / "env"), where=folder)
    python = folder / "env" / "bin" / "python"
    own = run(str(python), "-c", "import site; print(site.getsitepackages()[0])", where=folder).strip()
    lines = [f"import site; site.addsitedir({path!r})" for path in site.getsitepackages()]
    Path(own, "others.pth").write_text("\n".join(lines))
    (wheel,) = folder.glob("*.whl")
    run(str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel), where=folder)
    return python


def test_a_config_names_it_and_it_is_listed(environment, tmp_path):
    text = "model: {layers: [1, 2, 3], allocator: {class_path: Halving, init_args: {share: 0.25}}}"
    (tmp_path / "method.yaml").write_text(text)
    built, listed = run(str(environment), "-c", USE, where=tmp_path).split("\n", 1)
    assert "Halving(share=0.25, residual_at='last') [0.25, 0.25, 1.0]" in built
    assert "Halving" in listed
    assert "allocator" in listed


def test_its_own_test_passes(environment):
    printed = run(str(environment), "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", where=TEMPLATE)
    assert "3 passed" in printed
