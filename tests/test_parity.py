"""The recipes give the official code's numbers, and the benchmark that says so fails where they do not."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ARCHITECTURES
from safetensors.torch import load_file, save_file

from cakeflow import read_requests

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "parity.py"
BARS = {"gpt2": (1e-10, 1e-6), "llama": (1e-5, 1e-4)}
RECORDINGS = [
    ("memit", "memit"),
    ("memit_seq", "memit_seq"),
    ("memit_blue", "memit_blue"),
    ("alphaedit", "alphaedit"),
    ("alphaedit", "alphaedit_seq"),
    ("alphaedit_blue", "alphaedit_blue"),
    ("cake_paper", "alphaedit_seq"),
    ("rect", "rect"),
    ("pmet", "pmet"),
    ("pmet_seq", "pmet_seq"),
    ("rome_official", "rome"),
]


@pytest.fixture(scope="module")
def parity():
    spec = importlib.util.spec_from_file_location("parity", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["parity"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["parity"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("recipe", "recording"), RECORDINGS)
def test_recipes_give_the_official_numbers(parity, golden, arch, recipe, recording):
    recorded = parity.Golden.read(golden / "tiny" / f"{arch}_golden.json")
    worst = parity.compare(recorded, recipe, recording, read_requests(golden / "requests.json"))
    z_bar, delta_bar = BARS[arch]
    assert worst["z"] <= z_bar
    assert worst["z_later"] <= (z_bar if recording.startswith("alphaedit") else delta_bar)
    assert worst["delta"] <= delta_bar


def test_the_bars_of_the_script_are_these(parity):
    assert parity.BARS == BARS
    compared = {(recipe, name) for recipe, names in parity.RECORDINGS.items() for name in names}
    assert set(RECORDINGS) <= compared


def spoil_nothing(_tensors):
    pass


def spoil_delta(tensors):
    tensors["memit/delta/3"] *= 1 + 1e-5


def spoil_z(tensors):
    tensors["memit/z/4"][7, 3] += 1e-6


def spoil_shape(tensors):
    tensors["memit/delta/3"] = tensors["memit/delta/3"].T.contiguous()


def spoil_nan(tensors):
    tensors["memit/delta/3"][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "status"),
    [(spoil_nothing, 0), (spoil_delta, 1), (spoil_z, 1), (spoil_shape, 1), (spoil_nan, 1)],
)
def test_main_exits_1_where_numbers_differ(parity, golden, tmp_path, monkeypatch, capsys, spoil, status):
    """One architecture, one recording, changed by little more than the bar."""
    folder = tmp_path / "golden"
    for name in ("gpt2", "tokenizer"):
        shutil.copytree(golden / "tiny" / name, folder / "tiny" / name)
    shutil.copy(golden / "requests.json", folder)
    info = json.loads((golden / "tiny" / "gpt2_golden.json").read_text())
    info = {name: value for name, value in info.items() if name in ("_setup", "memit")}
    (folder / "tiny" / "gpt2_golden.json").write_text(json.dumps(info))
    tensors = load_file(golden / "tiny" / "gpt2_golden.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "tiny" / "gpt2_golden.safetensors")
    monkeypatch.setattr(sys, "argv", ["parity.py", "--golden", str(folder), "--json", str(tmp_path / "figures.json")])
    assert parity.main() == status
    assert ("ABOVE THE BAR" in capsys.readouterr().out) is bool(status)
    assert set(json.loads((tmp_path / "figures.json").read_text())) == {"gpt2/memit/memit"}


def test_main_exits_1_where_nothing_was_compared(parity, golden, tmp_path, monkeypatch):
    shutil.copy(golden / "requests.json", tmp_path)
    (tmp_path / "tiny").mkdir()
    monkeypatch.setattr(sys, "argv", ["parity.py", "--golden", str(tmp_path)])
    assert parity.main() == 1
