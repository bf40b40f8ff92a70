"""A manifest has one form, and every byte of it counts."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import JSON
from tiny_runs import editor_of, name_of

from cakeflow.errors import ConfigError, ExportError
from cakeflow.export import Manifest, require_place
from cakeflow.export.manifest import WeightHashes
from cakeflow.storage.hashing import tensor_hash

from .forgery import rendered, sealed_text

HASH = "0123456789abcdef" * 4
WHOLE = {
    "format": "delta",
    "model": "owner/model",
    "fingerprint": HASH,
    "dtype": "torch.float32",
    "edits": 2,
    "ledger": "",
    "weights": {"block.3.weight": {"before": HASH, "after": HASH[::-1]}},
    "files": {"delta.safetensors": HASH},
    "changes": [],
    "rollbacks": [{"batches": [2], "who": "ann@host", "time": "2026-03-01T12:30:59.250+00:00"}],
    "tolerance": 0.0,
    "version": 2,
}


@pytest.fixture
def path(tmp_path):
    """The file of a sound manifest."""
    (tmp_path / "manifest.json").write_text(sealed_text(WHOLE))
    return tmp_path / "manifest.json"


def test_what_is_written_is_read_back_byte_for_byte(path):
    manifest = Manifest.read(path.parent)
    assert manifest.text == sealed_text(WHOLE) == path.read_text()
    assert manifest.text.startswith('{\n "changes": [],\n "dtype": "torch.float32",\n')
    assert manifest.weights == {"block.3.weight": WeightHashes(before=HASH, after=HASH[::-1])}
    assert str(manifest.rollbacks[0]) == "batch 2 taken back by ann@host on 2026-03-01 12:30 UTC"
    assert Manifest.model_validate(WHOLE).text == manifest.text
    later = manifest.model_copy(update={"files": {}})
    assert later.text == sealed_text(WHOLE | {"files": {}})


def test_every_flipped_bit_is_noticed(path):
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(ExportError, match=r"manifest\.json.*take it from a copy"):
            Manifest.read(path.parent)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 3}, "version = 3"),
        ({"version": True}, "version = True"),
        ({"format": "onnx"}, "format = 'onnx'"),
        ({"model": None}, "model = None"),
        ({"fingerprint": HASH.upper()}, "fingerprint = '0123"),
        ({"fingerprint": f"{HASH}\n"}, "fingerprint = '0123"),
        ({"dtype": "torch.int8"}, "dtype = 'torch.int8'"),
        ({"edits": -1}, "edits = -1"),
        ({"edits": 1.0}, "edits = 1.0"),
        ({"edits": False}, "edits = False"),
        ({"ledger": "0"}, r"ledger\..* = '0'"),
        ({"weights": {"a": {"before": HASH}}}, r"weights\.a\.after: .*required"),
        ({"weights": {"a": {"before": HASH, "after": HASH, "now": HASH}}}, r"weights\.a\.now"),
        ({"weights": []}, r"weights = \[\]"),
        ({"files": {"../delta.safetensors": HASH}}, r"files\.\.\./delta"),
        ({"files": {"delta.safetensors\n": HASH}}, r"files\."),
        ({"files": {"": HASH}}, r"files\."),
        ({"files": {"a": "0"}}, r"files\.a = '0'"),
        ({"more": 1}, "more = 1"),
    ],
)
def test_a_field_of_another_form_is_named_however_sound_the_hash(path, change, words):
    path.write_text(sealed_text(WHOLE | change))
    with pytest.raises(ExportError, match=rf"(?s)manifest\.json[,:] {words}.*take it from a copy"):
        Manifest.read(path.parent)


@pytest.mark.parametrize("name", [*WHOLE, "hash"])
def test_a_field_that_is_missing_is_noticed(path, name):
    content = json.loads(path.read_text())
    del content[name]
    path.write_text(rendered(content))
    with pytest.raises(ExportError, match=rf"{name}: Field required|does not have its hash"):
        Manifest.read(path.parent)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=100) | JSON.map(json.dumps).map(str.encode) | st.just(b"[" * 100_000))
def test_only_our_error_gets_out_of_any_file(tmp_path, data):
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(ExportError):
        Manifest.read(tmp_path)


def test_a_manifest_tells_of_the_weights_that_differ(lm, requests, tmp_path):
    editor = editor_of(lm)
    before = {name_of(lm, layer): tensor_hash(lm.weight(name_of(lm, layer))) for layer in (1, 3)}
    editor.fit(requests[:2], evaluate=False, run_dir=tmp_path / "run")
    manifest = Manifest.of(editor.journal, "delta")
    assert {name: hashes.before for name, hashes in manifest.weights.items()} == before
    assert manifest.weights[name_of(lm, 3)].after == tensor_hash(lm.weight(name_of(lm, 3)))
    assert (manifest.model, manifest.edits, manifest.files) == (editor.module.name, 2, {})
    assert manifest.ledger == editor.journal.store.ledger.head
    editor.rollback()
    assert Manifest.of(editor.journal, "model").weights == {}


def test_only_an_export_may_be_replaced(path):
    assert require_place(path.parent, overwrite=True) == path.parent.resolve()
    with pytest.raises(ConfigError, match="exists already"):
        require_place(path.parent)
    path.rename(path.with_name("thesis.tex"))
    with pytest.raises(ExportError, match=r"has no manifest\.json"):
        require_place(path.parent, overwrite=True)
