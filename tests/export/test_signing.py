"""A signed export: any changed, added or missing byte is noticed, and so is another key."""

import sys

import pytest

from cakeflow.errors import ConfigError, ExportError
from cakeflow.export import apply_delta, require_signature, sign
from cakeflow.models import load_model


@pytest.fixture
def keys(tmp_path):
    """Two pairs of keys, as files."""
    pytest.importorskip("model_signing")
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    for name in ("own", "other"):
        key = ec.generate_private_key(ec.SECP256R1())
        secret = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
        public = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
        (tmp_path / f"{name}.pem").write_bytes(secret)
        (tmp_path / f"{name}.pub").write_bytes(public)
    return tmp_path


@pytest.fixture
def signed(one, keys):
    folder = one[1].export(keys / "out", "delta")
    sign(folder, keys / "own.pem")
    return folder


def test_what_was_signed_is_accepted_and_used(one, signed, keys):
    require_signature(signed, keys / "own.pub")
    sign(signed, keys / "own.pem")
    require_signature(signed, keys / "own.pub")
    lm = load_model(one[0])
    apply_delta(lm, signed)
    assert lm.fingerprint() == one[1].module.lm.fingerprint()


def change(folder):
    path = folder / "README.md"
    path.write_text(path.read_text() + " ")


@pytest.mark.parametrize(
    "spoil",
    [
        change,
        lambda folder: (folder / "README.md").unlink(),
        lambda folder: (folder / "more.txt").write_text("x"),
        lambda folder: (folder / "model.sig").write_text("{}"),
    ],
    ids=["changed", "missing", "added", "no signature of theirs"],
)
def test_a_folder_that_is_not_what_was_signed(signed, keys, spoil):
    spoil(signed)
    with pytest.raises(ExportError, match="is not what the owner of"):
        require_signature(signed, keys / "own.pub")


def test_another_key(signed, keys):
    with pytest.raises(ExportError, match="is not what the owner of"):
        require_signature(signed, keys / "other.pub")
    with pytest.raises(ConfigError, match=r"none\.pub is no file"):
        require_signature(signed, keys / "none.pub")


def test_a_key_that_signs_nothing(one, keys):
    folder = one[1].export(keys / "out", "delta")
    with pytest.raises(ConfigError, match="signs nothing"):
        sign(folder, keys / "own.pub")
    with pytest.raises(ConfigError, match=r"none\.pem is no file"):
        sign(folder, keys / "none.pem")
    with pytest.raises(ExportError, match=r"has no model\.sig"):
        require_signature(folder, keys / "own.pub")


def test_without_the_package_the_remedy_is_named(one, tmp_path, monkeypatch):
    for name in [each for each in sys.modules if each.startswith("model_signing.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "model_signing", None)
    folder = one[1].export(tmp_path / "out", "delta")
    with pytest.raises(ConfigError, match=r"pip install 'cakeflow\[sign\]'"):
        sign(folder, "key.pem")
