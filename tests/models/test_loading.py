"""Loading models by name, folder or file."""

import json
import threading
import time
from importlib import metadata

import gguf
import pytest
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError
from tiny_runs import editor_of

from cakeflow.errors import ArchitectureError, ConfigError
from cakeflow.journal.audit import replay
from cakeflow.models import loading
from cakeflow.models.loading import Loading, load_editable, load_model, load_vision_model, recorded
from cakeflow.storage.cache import cache_folder

MISSING = RepositoryNotFoundError.__new__(RepositoryNotFoundError)  # its arguments depend on the version


@pytest.mark.parametrize("name", ["no-such-folder/no-such-model/at-all", "smollm2", "missing.gguf", ""])
def test_unknown_model_says_what_was_tried(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"smollm2-135m.*folder.*\.gguf.*hub id"):
        load_model(name)


@pytest.mark.parametrize("load", [load_model, load_vision_model, load_editable])
@pytest.mark.parametrize("answer", ["no network", "no such model", "it is there"])
def test_nobody_waits_for_a_hub_out_of_reach(load, answer, monkeypatch):
    asked, offline = [], []

    def model_info(api, name, **options):
        asked.append((name, options["token"]))
        if answer != "it is there":
            raise OSError if answer == "no network" else MISSING

    def from_pretrained(*_, **__):
        offline.append(constants.HF_HUB_OFFLINE)
        raise ValueError("not here")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "model_info", model_info)
    for kind in ("AutoTokenizer", "AutoConfig", "AutoModelForCausalLM", "AutoImageProcessor"):
        monkeypatch.setattr(f"cakeflow.models.loading.{kind}.from_pretrained", from_pretrained)
    with pytest.raises(ConfigError, match="not here"):
        load("owner/name", token="hf_secret")
    assert asked[0] == ("owner/name", "hf_secret")
    assert set(offline) == {answer == "no network"}
    assert constants.HF_HUB_OFFLINE is False


def test_folder_without_a_model(tmp_path):
    with pytest.raises(ConfigError, match="is neither"):
        load_model(tmp_path)


def test_folder_loads_with_its_own_type(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.dtype == torch.float64
    assert loaded.fingerprint() == tiny.fingerprint()
    assert load_model(str(tmp_path), dtype="float32").dtype == torch.float32


def test_a_folder_loads_without_a_word(lm, tmp_path, capfd):
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    capfd.readouterr()
    load_model(tmp_path / "model")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("damage", ["nothing", "a broken file"])
def test_a_folder_without_a_tokenizer_is_refused_before_weights_are_loaded(tiny, tmp_path, monkeypatch, damage):
    """Transformers makes up a tokenizer without a vocabulary for some families."""
    tiny.model.save_pretrained(tmp_path)
    if damage == "a broken file":
        (tmp_path / "tokenizer.json").write_text("{")
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ConfigError) as caught:
        load_model(tmp_path)
    assert f"model {str(tmp_path)!r} has no tokenizer that loads" in str(caught.value)
    assert f"AutoTokenizer.from_pretrained(BASE).save_pretrained({str(tmp_path)!r})" in str(caught.value)


@pytest.mark.real
def test_embedded_model_loads_and_loads_again_from_the_cache(smollm2):
    first = load_model("smollm2-135m")
    folder = next((cache_folder() / "models").iterdir())
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    start = time.perf_counter()
    second = load_model("smollm2-135m")
    assert time.perf_counter() - start < 10
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert first.fingerprint() == second.fingerprint() == smollm2.fingerprint()
    assert (second.depth, second.dtype) == (30, torch.float32)
    ids = second.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert second.tokenizer.decode(second.model(ids).logits[0, -1].argmax()) == " Paris"


def test_attention_without_masks_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    with pytest.raises(ArchitectureError, match=r"'org/kernel' takes no explicit mask"):
        load_model("anything", attn_implementation="org/kernel")


def test_python_in_a_models_folder_runs_only_when_it_is_trusted(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path / "own")
    tiny.tokenizer.save_pretrained(tmp_path / "own")
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    own = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    (tmp_path / "own" / "config.json").write_text(json.dumps(config | {"auto_map": own, "model_type": "own"}))
    (tmp_path / "own" / "modeling_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(ConfigError, match="trust_remote_code"):
        load_model(tmp_path / "own")
    assert not (tmp_path / "ran").exists()


def test_a_file_is_converted_once_by_whoever_comes_first(tmp_path, monkeypatch):
    """The other one waits, and never sees a part of it."""
    monkeypatch.setenv("CAKEFLOW_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.gguf").write_bytes(b"weights")
    calls, second = [], []

    def convert(gguf, folder):
        calls.append(gguf)
        if len(calls) == 1:
            (folder / "model.safetensors").touch()
            raise KeyboardInterrupt
        thread = threading.Thread(target=lambda: second.append(loading._converted(gguf)))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        (folder / "tokenizer.json").touch()
        second.append(thread)

    monkeypatch.setattr(loading, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        loading._converted(tmp_path / "a.gguf")
    assert list((tmp_path / "cache/models").iterdir()) == []
    folder = loading._converted(tmp_path / "a.gguf")
    second[0].join()
    assert second[1] == folder
    assert [each.name for each in folder.iterdir()] == ["tokenizer.json"]
    assert len(calls) == 2


def test_arguments_that_say_which_files_are_meant_hold_for_the_tokenizer_too(lm, tmp_path):
    lm.model.save_pretrained(tmp_path / "repository" / "part")
    lm.tokenizer.save_pretrained(tmp_path / "repository" / "part")
    loaded = load_model(tmp_path / "repository", subfolder="part")
    assert loaded.tokenizer.get_vocab() == lm.tokenizer.get_vocab()
    with pytest.raises(ConfigError, match="that loads here"):
        load_model(tmp_path / "repository")


def test_options_reach_model_and_tokenizer_alike_and_the_ledger_has_no_token(workplace, requests, monkeypatch):
    """A run by options; replay asks for them again, without the token, which no file of the run has."""
    seen = []
    for kind in (loading.AutoTokenizer, loading.AutoModelForCausalLM):
        real = kind.from_pretrained

        def spy(name, *args, real=real, kind=kind, **kwargs):
            seen.append((kind.__name__, kwargs.get("revision"), kwargs.get("token"), kwargs.get("trust_remote_code")))
            return real(name, *args, **kwargs)

        monkeypatch.setattr(kind, "from_pretrained", spy)
    options = {"revision": "v1", "token": "hf_secret", "trust_remote_code": True}
    lm = load_model(workplace / "model", **options)
    assert {each[1:] for each in seen} == {("v1", "hf_secret", True)}
    assert {each[0] for each in seen} == {"AutoTokenizer", "AutoModelForCausalLM"}
    assert recorded(options, lm) == {"revision": "v1"}
    assert "hf_secret" not in repr(Loading(token="hf_secret"))
    editor = editor_of(lm)
    editor.module._loading = options
    editor.module.name = str(workplace / "model")
    editor.fit(requests[:2], run_dir=workplace / "run", evaluate=False)
    assert not any(b"hf_secret" in path.read_bytes() for path in (workplace / "run").rglob("*") if path.is_file())
    assert b'"loading":{"revision":"v1"}' in (workplace / "run/journal/ledger.jsonl").read_bytes()
    seen.clear()
    replay(workplace / "run")
    assert {each[1:] for each in seen} == {("v1", None, False)}
    seen.clear()
    replay(workplace / "run", loading=Loading(revision="v2", token="other"))
    assert {each[1:] for each in seen} == {("v2", "other", False)}


def test_a_package_says_its_version(monkeypatch):
    monkeypatch.delattr(gguf, "__version__", raising=False)
    loading._name_version("gguf")
    assert gguf.__version__ == metadata.version("gguf")
    monkeypatch.setattr(gguf, "__version__", "its own")
    loading._name_version("gguf")
    assert gguf.__version__ == "its own"
