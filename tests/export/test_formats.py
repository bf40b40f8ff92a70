"""What is exported is the edited model: the same bits, or the stated tolerance; and nothing else can be made of it."""

import copy
import json
import re
import resource
from contextlib import contextmanager, suppress

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_runs import LAYERS, content, editor_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from cakeflow.errors import ConfigError, EditError, ExportError
from cakeflow.export import apply_delta
from cakeflow.models.loading import load_model
from cakeflow.storage.hashing import file_hash, tensor_hash

from .conftest import logits
from .forgery import rendered, sealed_text

FORMATS = ("model", "delta", "lora")


def test_a_model_loads_and_gives_the_same_logits(case, ids, tmp_path):
    base, editor = case
    before = editor.module.lm.fingerprint()
    editor.save_pretrained(tmp_path / "out")
    assert editor.module.lm.fingerprint() == before
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.dtype == editor.model.dtype
    assert torch.equal(logits(plain, ids), logits(editor.model, ids))
    assert not torch.equal(logits(load_model(base).model, ids), logits(editor.model, ids))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Ann plays")["input_ids"]


def test_a_delta_gives_the_same_bits(case, tmp_path):
    base, editor = case
    editor.export(tmp_path / "out", "delta")
    assert sorted(content(tmp_path / "out")) == ["README.md", "delta.safetensors", "manifest.json"]
    fresh = load_model(base)
    manifest = apply_delta(fresh, tmp_path / "out")
    assert fresh.fingerprint() == editor.module.lm.fingerprint()
    assert manifest.edits == 4
    assert manifest.ledger == editor.journal.store.ledger.head
    assert len(manifest.weights) == len(LAYERS)
    for name, messages in manifest.weights.items():
        assert tensor_hash(fresh.model.get_parameter(name)) == messages.after != messages.before
    after = fresh.fingerprint()
    with pytest.raises(ExportError, match="edited already"):
        apply_delta(fresh, tmp_path / "out")
    assert fresh.fingerprint() == after


def test_what_was_taken_back_is_not_exported(one, requests, tmp_path):
    base, editor = one
    editor = editor_of(load_model(base))
    editor.fit(requests[:4], 2, run_dir=tmp_path / "run")
    editor.rollback(batch=0)
    now = editor.module.lm.fingerprint()
    for format in FORMATS:
        editor.export(tmp_path / format, format)
    assert load_model(tmp_path / "model").fingerprint() == now
    fresh = load_model(base)
    assert apply_delta(fresh, tmp_path / "delta").edits == 2
    assert fresh.fingerprint() == now
    assert {min(t.shape) for t in load_file(tmp_path / "lora/adapter_model.safetensors").values()} == {2}
    card = (tmp_path / "model/README.md").read_text()
    assert "The weights were changed after the last measurement: the metrics" in card
    assert json.dumps(requests[3].subject, ensure_ascii=False) in card
    assert json.dumps(requests[0].subject, ensure_ascii=False) not in card
    editor.rollback()
    for format in ("delta", "lora"):
        with pytest.raises(ExportError, match="no weight differs"):
            editor.export(tmp_path / "none", format)


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_there_is_kept_until_the_new_one_is_whole(one, tmp_path, format):
    _, editor = one
    out = tmp_path / "out"
    editor.export(out, format)
    before = content(tmp_path)
    with pytest.raises(ConfigError, match="overwrite=True"):
        editor.export(out, format)
    largest = max(path.stat().st_size for path in out.iterdir())
    for size in (100, 1000, largest - 1):  # each is too small for another file
        with pytest.raises((OSError, SafetensorError)), full_disk(size):
            editor.export(out, format, overwrite=True)
        assert content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / "debris").touch()
    editor.export(out, format, overwrite=True)
    assert set(content(tmp_path)) == set(before)


@contextmanager
def full_disk(size):
    """No file can grow beyond so many bytes: what a full disk is to whoever writes. Python ignores the signal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_only_an_export_is_overwritten(one, tmp_path):
    _, editor = one
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years")
    (tmp_path / "file").write_text("x")
    for name, kind in (("mine", ExportError), ("file", ConfigError)):
        with pytest.raises(kind, match="choose another"):
            editor.export(tmp_path / name, "delta", overwrite=True)
    with pytest.raises(ConfigError, match="expected model, delta, lora"):
        editor.export(tmp_path / "out", "onnx")
    assert sorted(content(tmp_path)) == ["file", "mine/thesis.tex"]


@pytest.fixture
def delta(one, tmp_path):
    """A delta of whole weights, and the unedited model it belongs to; those of factors are in ``test_delta``."""
    base, editor = one
    editor.export(tmp_path / "delta", "delta", layout="dense")
    return tmp_path / "delta", load_model(base)


def refused(lm, folder, words=""):
    before = state_of(lm)
    with pytest.raises(ExportError, match=words):
        apply_delta(lm, folder)
    assert state_of(lm) == before


def state_of(lm):
    return {name: tensor_hash(tensor) for name, tensor in lm.model.state_dict().items()}


def test_any_flipped_byte_of_a_delta_is_noticed(delta):
    folder, lm = delta
    for path in (folder / "delta.safetensors", folder / "manifest.json"):  # the card is for people
        whole = path.read_bytes()
        for place in {0, 9, len(whole) // 3, len(whole) // 2, len(whole) - 1}:
            data = bytearray(whole)
            data[place] ^= 1
            path.write_bytes(bytes(data))
            refused(lm, folder, "take it from a copy")
        path.write_bytes(whole)


def test_a_delta_is_for_one_model_only(delta, one, edited, requests, tmp_path):
    folder, lm = delta
    refused(one[1].module.lm, folder, "edited already")
    other = copy.deepcopy(lm)
    with torch.no_grad():
        next(other.model.parameters())[0, 0] += 1e-3
    refused(other, folder, "other weights")
    refused(load_model(one[0], dtype="bfloat16"), folder, r"torch.float32, this one is in torch.bfloat16")
    refused(load_model(edited("llama", torch.float32, requests)[0]), folder, "this model has")
    for format in ("model", "lora"):
        one[1].export(tmp_path / format, format)
        refused(lm, tmp_path / format, "is no delta")
    refused(lm, tmp_path / "nowhere", "has no manifest")
    (folder / "delta.safetensors").unlink()
    refused(lm, folder, "is missing")


def forged(folder, tensors, **changes):
    """A delta whose hashes fit, whoever made it."""
    save_file(tensors, folder / "delta.safetensors")
    messages = json.loads((folder / "manifest.json").read_text())
    messages.pop("details", None)  # as before there were layouts; those are forged in test_delta
    files = {"delta.safetensors": file_hash(folder / "delta.safetensors")}
    (folder / "manifest.json").write_text(sealed_text(messages | {"files": files} | changes))


def test_a_forged_delta_reaches_no_other_weight(delta):
    folder, lm = delta
    good = load_file(folder / "delta.safetensors")
    messages = json.loads((folder / "manifest.json").read_text())["weights"]
    name = min(good)

    def weights(of, tensor):
        before = lm.model.state_dict().get(of, tensor)
        return {**messages, of: {"before": tensor_hash(before), "after": tensor_hash(tensor)}}

    block = "transformer.h.{}.{}"
    inside = [block.format(1, "attn.c_attn.bias"), block.format(99, "mlp.c_proj.weight"), f"{name[:-6]}bias"]
    for foreign in ("lm_head.weight", *inside, "../../x", "__class__", ""):
        tensor = torch.zeros(4, 4)
        forged(folder, {**good, foreign: tensor}, weights=weights(foreign, tensor))
        refused(lm, folder, "no edit of this model could change")
    for tensor in (good[name].T.contiguous(), good[name].double(), torch.zeros(0), good[name].flatten()):
        forged(folder, {**good, name: tensor}, weights=weights(name, tensor))
        refused(lm, folder, "but the model has")
    for number in (float("nan"), float("inf")):
        tensor = good[name].clone().index_fill_(0, torch.tensor(1), number)
        forged(folder, {**good, name: tensor}, weights=weights(name, tensor))
        refused(lm, folder, f"{re.escape(name)}': not finite")
    forged(folder, {**good, name: good[name] + 1}, weights=messages)
    refused(lm, folder, "not the weight that the manifest names")
    forged(folder, {name: good[name]}, weights=messages)
    refused(lm, folder, "name different weights")
    for files in ({"../delta.safetensors": "0" * 64}, {"/etc/passwd": "0" * 64}, {"..": "0" * 64}):
        forged(folder, good, weights=messages, files=files)
        refused(lm, folder, rf"manifest\.json, files\..*{re.escape(min(files))}")
    forged(folder, good, weights=messages)
    (folder / "delta.safetensors").write_bytes(b"no tensors")
    data = (folder / "manifest.json").read_text()
    refused(lm, folder, "was changed after it was written")
    forged(folder, good, weights=messages)
    assert (folder / "manifest.json").read_text() == data
    apply_delta(lm, folder)


HASHES = st.sampled_from(["0" * 64, "f" * 64, "F" * 64, "", "x"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | HASHES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.just("before"), inner, max_size=3),
    max_leaves=6,
)
NAMES = ("version", "format", "model", "fingerprint", "dtype", "edits", "ledger", "weights", "files", "hash", "details")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), JSON, min_size=1, max_size=2),
    sealed=st.booleans(),
)
def test_only_our_errors_get_out_of_a_manifest(delta, changes, sealed):
    folder, lm = delta
    path = folder / "manifest.json"
    whole = path.read_text()
    original = json.loads(whole)
    messages = {**original, **changes}
    try:
        path.write_text(sealed_text(messages) if sealed else rendered(messages))
        with suppress(EditError):
            apply_delta(copy.deepcopy(lm), folder)
            messages = json.loads(path.read_text())
            free = {"model", "edits", "ledger", "hash"} if sealed else set()
            assert {name: value for name, value in messages.items() if original.get(name) != value}.keys() <= free
    finally:
        path.write_text(whole)
