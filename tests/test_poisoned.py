"""Files of ours and of others that are damaged or forged: named, nothing in them executed, nothing half read."""

import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cakeflow.cli.command_line import run_command as main
from cakeflow.core.config import build_module
from cakeflow.core.statistics import Statistics
from cakeflow.errors import ConfigError, StatisticsError
from cakeflow.models import Site
from cakeflow.models.loading import load_model
from cakeflow.storage.hashing import tensor_hash

PACKED = struct.pack("<Q", 2) + b"{}"
OVERLAP = json.dumps({n: {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]} for n in ("moment", "eigenvalues")})
POISONED = {
    "garbage": b"\xff" * 500,
    "empty": b"",
    "header-beyond-the-file": struct.pack("<Q", 1 << 40) + b"{}",
    "header-of-no-json": struct.pack("<Q", 4) + b"{{{{",
    "overlapping": struct.pack("<Q", len(OVERLAP)) + OVERLAP.encode() + b"\0" * 8,
    "pickle": b"\x80\x04cos\nsystem\n",
    "without-tensors": PACKED,
}

SITES = [Site(1, "mlp_out"), Site(2, "mlp_out")]


@pytest.fixture
def statistics(lm, tmp_path):
    """Settings whose statistics lie in a folder, and the file of the one layer."""
    (tmp_path / "corpus.txt").write_text("the sea was calm and every small boat came home before night " * 30)
    result = Statistics(tmp_path / "corpus.txt", tokens=300, window=20)
    result.collect(lm, SITES[1:], tmp_path / "kept")
    return result, next((tmp_path / "kept").rglob("layer-2-mlp_out.safetensors"))


def contents(path):
    """Metadata and hash of every tensor; safetensors writes metadata in any order."""
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {name: tensor_hash(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("name", [*POISONED, "cut", "other-shape"])
def test_poisoned_statistics_are_named_and_made_again_once_deleted(name, lm, statistics, tmp_path):
    settings, path = statistics
    good, cut = contents(path), path.read_bytes()[:-100]
    path.write_bytes(POISONED.get(name, cut))
    if name == "other-shape":
        save_file({part: torch.ones(3, 3) for part in ("moment", "eigenvalues", "eigenvectors")}, path)
    with pytest.raises(StatisticsError, match=rf"{path} is damaged.*; delete it, and it is collected again"):
        settings.collect(lm, SITES, tmp_path / "kept")
    assert not path.with_name("layer-1-mlp_out.safetensors").exists()  # nothing was collected before the fault was seen
    path.unlink()
    settings.collect(lm, SITES[1:], tmp_path / "kept")
    assert contents(path) == good


def test_poisoned_partial_sums_are_named(lm, statistics, tmp_path):
    settings, path = statistics
    partial = path.with_name("partial.safetensors")
    partial.write_bytes(POISONED["garbage"])
    with pytest.raises(StatisticsError, match=r"partial.safetensors is damaged"):
        settings.collect(lm, SITES, tmp_path / "kept")
    save_file({"sum/1": torch.ones(2, 2)}, partial)  # not all that there must be
    with pytest.raises(StatisticsError, match=r"partial.safetensors is damaged .*delete it"):
        settings.collect(lm, SITES, tmp_path / "kept")
    partial.unlink()
    assert [site.layer for site in settings.collect(lm, SITES, tmp_path / "kept")] == [1, 2]


@pytest.mark.parametrize("name", POISONED)
@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_poisoned_models_are_named(name, file, lm, tmp_path):
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(POISONED[name])
    fault = "has no tokenizer that loads" if file == "tokenizer.json" else "is neither .* that loads here"
    with pytest.raises(ConfigError, match=rf"model '{tmp_path}' {fault}: "):
        load_model(tmp_path)


def test_pickled_weights_are_not_executed(lm, tmp_path):
    lm.model.config.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(f"cos\nsystem\n(S'touch {tmp_path}/marker'\ntR.".encode())
    with pytest.raises(ConfigError, match="that loads here"):
        load_model(tmp_path)
    assert not (tmp_path / "marker").exists()


TAGS = ("object/apply:os.system", "object/new:os.system", "object:os.system", "name:os.system", "module:os")
CONFIGS = {
    **{tag: f'model: {{layers: !!python/{tag} ["touch marker"]}}'.encode() for tag in TAGS},
    "utf16": "model: {}".encode("utf-16"),
    "deep": b"model: {layers: " + b"[" * 2000 + b"]" * 2000 + b"}",
    "unclosed": b"model: {layers: [1, 2",
    "tab": b"model:\n\tlayers: [1]",
    "control": b"model: \0",
    "list": b"- model",
    "scalar": b"5",
    "nan": b"model: {layers: [.nan]}",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_poisoned_configs(name, tmp_path, monkeypatch, capsys):
    """The command line ends with status 2, nothing of it is executed, and no model is loaded."""
    monkeypatch.setattr("sys.argv", ["cakeflow"])
    monkeypatch.setattr("cakeflow.evaluation.evaluation.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    path = tmp_path / "mine.yaml"
    path.write_bytes(CONFIGS[name])
    with pytest.raises(ConfigError, match=r"mine.yaml"):
        build_module([path])
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={path}", "--data.source=missing.json"])
    assert stop.value.code == 2
    assert "error" in capsys.readouterr().err
    assert not (tmp_path / "marker").exists()


def test_what_looks_like_markup_is_shown_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["cakeflow"])
    (tmp_path / "a.json").write_text(
        json.dumps({"prompt": "The river {} flows into", "subject": "[/bold] ", "target_new": "the sea"})
    )
    with pytest.raises(SystemExit):
        main(["fit", "--model.layers=[1]", "--data.source", str(tmp_path / "a.json")])
    assert "subject = '[/bold] ': remove the white space" in capsys.readouterr().err
