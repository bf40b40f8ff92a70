"""The repository's own rules, read from its source."""

import ast
import configparser
import re
from graphlib import TopologicalSorter
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[1]
CORE = sorted((ROOT / "cakeflow").rglob("*.py"))
FOLDERS = ("cakeflow", "plugins", "configs", "benchmarks", "docs", "tests")
PYTHON = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
LIBRARY = [
    path
    for path in PYTHON
    if path.relative_to(ROOT).parts[0] in ("cakeflow", "plugins") and "tests" not in path.parts[-3:]
]
MAY_HOOK = {"hooks.py", "routing.py"}
METHODS = {"rome", "memit", "pmet", "alphaedit", "blue", "cake", "rect", "prune", "mend", "grace", "emmet", "wise"}
MOST_EXPORTS = 30
UNSAFE = {"torch.load", "numpy.load", "np.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec",
          "pandas.read_pickle", "pd.read_pickle"}  # fmt: skip
RUNS_DATA = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
PARTS = {path.parent.name for path in CORE} - {"cakeflow"}


def name(path):
    return str(path.relative_to(ROOT))


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(path):
    return [node for node in ast.walk(tree(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def lines(function):
    """Lines of a function's body, without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def dotted(node):
    """``a.b.c`` of an attribute chain."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


ROOMS = (
    "errors", "storage", "ranks", "data", "solvers", "models", "forward", "allocators", "metrics", "journal", "targets",
    "tracing", "evaluation", "export", "weighters", "plugins", "core", "callbacks", "report", "editor", "desk",
    "tuning", "suites", "cli", "testing", "__init__", "__main__",
)  # fmt: skip
"""From the ground up: a room imports from lower ones only."""
PARTICIPLES = {"found", "told", "wanted", "asked", "kept", "given", "known", "shown", "seen", "held", "said"}
OPENINGS = re.compile(r"(What|Whether|How|Which|Where)\b")


@pytest.fixture(params=CORE, ids=name)
def core(request):
    return request.param


def test_there_is_something_to_check():
    assert len(CORE) > 30
    assert {"hooks.py"} <= {path.name for path in CORE}
    assert Path(__file__) in PYTHON


def test_one_file_hooks_modules_and_one_probes_them(core):
    hooks = [node.attr for node in ast.walk(tree(core)) if isinstance(node, ast.Attribute) and "register_" in node.attr]
    hooks = [hook for hook in hooks if hook.endswith("hook")]
    assert not hooks or core.name in MAY_HOOK
    assert ("register_forward" in core.read_text(encoding="utf-8")) <= (core.name in MAY_HOOK)


def test_core_prints_nothing_and_has_no_globals(core):
    for node in ast.walk(tree(core)):
        assert not isinstance(node, ast.Global), f"{name(core)}:{node.lineno}"
        assert getattr(node, "id", "") != "print", f"{name(core)}:{node.lineno}"


def test_files_and_functions_are_short():
    for path in PYTHON:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, name(path)
        assert [node.name for node in functions(path) if lines(node) > 60] == [], name(path)


def test_most_functions_are_very_short():
    assert median(lines(node) for path in CORE for node in functions(path)) <= 8


def public(node, inside=""):
    """(name, definition) of every public class and function."""
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef)) and not child.name.startswith("_"):
            yield inside + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{child.name}.")


def is_overload(node):
    return any(dotted(decorator) == "overload" for decorator in node.decorator_list)


def test_public_names_are_documented(core):
    assert ast.get_docstring(tree(core))
    undocumented = [
        f"{name(core)}:{node.lineno} {label}"
        for label, node in public(tree(core))
        if not is_overload(node) and not ast.get_docstring(node)
    ]
    assert undocumented == []


def test_public_functions_are_annotated(core):
    bare = []
    for label, node in public(tree(core)):
        if isinstance(node, ast.FunctionDef):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
            missing = [arg.arg for arg in given if arg and not arg.annotation and arg.arg not in ("self", "cls")]
            bare += [f"{label}({missing})"] if missing or node.returns is None else []
    assert bare == []


def test_the_package_exports_few_names():
    names = set(exported(ROOT / "cakeflow" / "__init__.py")) - set(ROOMS)
    assert 20 < len(names) <= MOST_EXPORTS


def test_setup_lists_the_packages_on_disk():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    listed = set(config["options"]["packages"].split())
    folders = dict(re.findall(r"(\S+) = (\S+)", config["options"]["package_dir"]))
    for package in listed:
        top, *rest = package.split(".")
        assert Path(ROOT, folders.get(top, top), *rest, "__init__.py").is_file(), package
    on_disk = {name(path.parent).replace("/", ".") for path in CORE if path.name == "__init__.py"}
    assert on_disk == {package for package in listed if package.split(".")[0] == "cakeflow"}
    assert {name(path.parent).replace("/", ".") for path in CORE} == on_disk
    plugins = {path.parent.name for path in (ROOT / "plugins").glob("*/__init__.py")}
    assert plugins == {package for package in listed if folders.get(package, "").startswith("plugins/")}


def test_no_core_file_is_named_after_a_method(core):
    assert set(core.stem.split("_")).isdisjoint(METHODS)


def running_data(code):
    """Lines of a source text that could run what a file says: unpickling, unsafe YAML, ``eval``."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            bad = {alias.name.split(".")[0] for alias in node.names} & RUNS_DATA
        elif isinstance(node, ast.ImportFrom):
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            bad = {(node.module or "").split(".")[0]} & RUNS_DATA | full & UNSAFE
        elif isinstance(node, ast.Call):
            sealed = any(word.arg == "allow_pickle" and ast.unparse(word.value) == "False" for word in node.keywords)
            bad = not sealed and dotted(node.func) in UNSAFE
        else:
            bad = False
        if bad:
            yield node.lineno


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_nothing_runs_what_a_file_says(path):
    assert list(running_data(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("code", "bad"),
    [
        ("import pickle", True),
        ("import os, joblib.memory", True),
        ("from shelve import open", True),
        ("from torch import nn, load", True),
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=True)", True),
        ("np.load(path)", True),
        ("np.load(path, allow_pickle=True)", True),
        ("np.load(path, allow_pickle=False)", False),
        ("yaml.load(text, yaml.SafeLoader)", True),
        ("yaml.safe_load(text)", False),
        ("def f(x):\n    return eval(x)", True),
        ("model.eval()", False),
        ("exec(text)", True),
        ("json.loads(text)", False),
    ],
)
def test_what_runs_data_is_seen(code, bad):
    assert bool(list(running_data(code))) is bad


def room(path):
    """The room of a file of the core."""
    return path.relative_to(ROOT / "cakeflow").parts[0].removesuffix(".py")


def imports(path):
    """Names of the modules that a file imports, wherever in it; imports for annotations alone aside."""
    source = tree(path)
    for node in ast.walk(source):
        if isinstance(node, ast.If) and dotted(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(source):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_the_top_has_rooms_and_seven_files():
    top = {path.name for path in (ROOT / "cakeflow").iterdir()} - {"__pycache__", "py.typed", "__init__.pyi"}
    files = {"__init__.py", "__main__.py", "editor.py", "errors.py", "plugins.py", "ranks.py", "testing.py"}
    assert top - files == {each for each in ROOMS if (ROOT / "cakeflow" / each).is_dir()}
    assert files <= top


def test_no_room_imports_upward(core):
    """So there is no cycle between rooms either."""
    modules = [module.split(".")[1] for module in imports(core) if module.startswith("cakeflow.")]
    upward = [module for module in modules if ROOMS.index(module) > ROOMS.index(room(core))]
    assert upward == []


def test_no_cycle_between_files():
    """Each file after those that it imports; a cycle has no such order."""
    graph = {}
    for path in CORE:
        own = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        graph[own] = {module for module in imports(path) if module != own and module.startswith("cakeflow.")}
    list(TopologicalSorter(graph).static_order())


def bound(path):
    """Names that a file binds: variables, attributes, parameters, functions and classes."""
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name


def test_names_are_nouns_and_verbs():
    files = [path for path in PYTHON if path.parts[len(ROOT.parts)] in ("cakeflow", "plugins")]
    lines_of_code = sum(path.read_text(encoding="utf-8").count("\n") for path in files)
    participles = [each for path in files for each in bound(path) if PARTICIPLES & set(each.lower().split("_"))]
    assert len(participles) <= 5 * lines_of_code / 1000, participles


def test_docstrings_say_it_directly():
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    files = [path for path in PYTHON if path.parts[len(ROOT.parts)] in ("cakeflow", "plugins")]
    nodes = [(path, node) for path in files for node in ast.walk(tree(path)) if isinstance(node, kinds)]
    texts = [(name(path), text) for path, node in nodes if (text := ast.get_docstring(node))]
    openings = [(path, text.split("\n")[0]) for path, text in texts if OPENINGS.match(text)]
    assert len(openings) <= len(texts) / 100, openings


def test_core_imports_neither_tests_nor_plugins(core):
    plugins = {path.name for path in (ROOT / "plugins").iterdir()} if (ROOT / "plugins").is_dir() else set()
    modules = [node.module or "" for node in ast.walk(tree(core)) if isinstance(node, ast.ImportFrom)]
    assert {module.split(".")[0] for module in modules}.isdisjoint({"tests", "benchmarks", *plugins})


def imported_names(path):
    """(module, name) of every absolute import of a name."""
    nodes = [node for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom) and node.module]
    return [(node.module, alias.name) for node in nodes for alias in node.names]


def face(init):
    """The file that says what a package exports: the stub beside one that imports on first use."""
    return stub if (stub := init.with_suffix(".pyi")).is_file() else init


def exported(init):
    """The names in ``__all__``."""
    body = tree(face(init)).body
    (names,) = [node.value for node in body if isinstance(node, ast.Assign) and dotted(node.targets[0]) == "__all__"]
    return ast.literal_eval(names)


@pytest.mark.parametrize("path", [path for path in CORE if path.name == "__init__.py"], ids=name)
def test_a_room_exports_what_it_imported_names(path):
    nodes = [node for node in tree(face(path)).body if isinstance(node, ast.ImportFrom)]
    aliases = {alias.name for node in nodes for alias in node.names} - {"attach_stub"}
    assert set(exported(path)) == aliases


def test_random_draws_come_from_generators_of_our_own():
    """A draw from the global generator changes with what other threads draw."""
    drawing = {"rand", "randn", "randint", "randperm", "multinomial", "bernoulli", "normal", "normal_", "uniform_"}
    calls = [(path, node) for path in LIBRARY for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    draws = [(path, node) for path, node in calls if getattr(node.func, "attr", "") in drawing]
    own = [
        node
        for _, node in draws
        if "generator" in {word.arg for word in node.keywords} or "default_rng" in ast.unparse(node)
    ]
    assert len(own) > 10
    assert not [f"{name(path)}:{node.lineno}" for path, node in draws if node not in own]


@pytest.mark.parametrize(
    "path", [path for path in PYTHON if name(path).startswith(("benchmarks", "plugins"))], ids=name
)
def test_plugins_and_benchmarks_import_public_names_only(path):
    for module, alias in imported_names(path):
        top, *rooms = module.split(".")
        if top == "cakeflow" and rooms not in (["errors"], ["plugins"], ["testing"]):
            assert alias in exported(ROOT.joinpath(top, *rooms, "__init__.py")), f"{module}.{alias}"


def test_every_module_has_tests(core):
    """``tests/test_X.py`` for a module; in a package, ``tests/PACKAGE/test_X.py`` or ``tests/test_PACKAGE.py``."""
    if core.name == "__init__.py":
        return
    folder = core.parent.name
    inside = [f"{folder}/test_{core.stem}.py", f"test_{folder}.py"]
    places = [f"test_{core.stem}.py"] if folder == "cakeflow" else [*inside, f"{folder}/test_{folder}.py"]
    assert any((ROOT / "tests" / place).is_file() for place in places), places


def test_every_test_file_has_a_module():
    plugins = {path.parent.name for path in (ROOT / "plugins").glob("*/__init__.py")}
    further = {
        "layout",
        "parity",
        "families",
        "other_trees",
        "dispatched",
        "template",
        "malformed",
        "poisoned",
        "fuzz",
        "format1",
        "path",
    }
    further |= {"commands", "life", "pages", "sites", "windows"}
    parts = {f"{path.parent.name}_{path.stem}" for path in (ROOT / "plugins").glob("*/*.py")}
    stems = {path.stem for path in CORE} | PARTS | further | plugins | parts
    assert plugins <= {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "plugins").glob("test_*.py")}
    for path in (ROOT / "tests").rglob("test_*.py"):
        assert path.stem.removeprefix("test_") in stems, name(path)


def test_no_file_names_a_place_on_one_machine():
    for path in PYTHON + sorted((ROOT / "configs").rglob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"[\"'(= ]/(work|home|root|Users)/", text), name(path)
