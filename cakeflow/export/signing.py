"""A signature of an export, which a third party can check: OpenSSF's model signing, by a key."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

from cakeflow.errors import ConfigError, ExportError
from cakeflow.export.manifest import Manifest

SIGNATURE = "model.sig"


def require_key(key: str | Path) -> Path:
    """Return a key's file, if there is one and signatures can be made and checked here.

    Raises:
        ConfigError: If not.
    """
    _package("signing")
    if not Path(key).is_file():
        raise ConfigError(f"{key} is no file; give a key on an elliptic curve as PEM")
    return Path(key)


def sign(folder: str | Path, key: str | Path) -> Path:
    """Sign all files of an export as they are now, but those of git, which the hub adds.

    Args:
        folder: The export; the signature is written into it.
        key: Private key on an elliptic curve, a PEM file.

    Returns:
        The signature's file.

    Raises:
        ConfigError: If ``model-signing`` is not installed, or the key cannot be read.
    """
    folder = Path(folder)
    Manifest.read(folder)
    key = require_key(key)
    signing, hashing = _package("signing"), _package("hashing")
    path = folder / SIGNATURE
    all_but_it = hashing.Config().set_ignored_paths(paths=[SIGNATURE])
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=key)
        config.set_hashing_config(all_but_it).sign(folder, path)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{key} signs nothing: {error}; give a private key on an elliptic curve as PEM") from error
    return path


def require_signature(folder: str | Path, key: str | Path) -> None:
    """Check that an export is what the owner of a key signed, to the last byte of each file.

    Args:
        folder: The export.
        key: The public key, a PEM file.

    Raises:
        ConfigError: If ``model-signing`` is not installed, or the key cannot be read.
        ExportError: If there is no signature, or the files are not those that were signed.
    """
    path = Path(folder) / SIGNATURE
    if not path.is_file():
        raise ExportError(f"{folder} has no {SIGNATURE}; sign it: cakeflow export ... --sign KEY")
    key = require_key(key)
    try:
        _package("verifying").Config().use_elliptic_key_verifier(public_key=key).verify(Path(folder), path)
    except Exception as error:  # the package has no family of errors
        raise ExportError(f"{folder} is not what the owner of {key} signed: {error}") from error


def _package(name: str) -> ModuleType:
    try:
        return import_module(f"model_signing.{name}")
    except ImportError as error:
        raise ConfigError("signatures need model-signing: pip install 'cakeflow[sign]'") from error
