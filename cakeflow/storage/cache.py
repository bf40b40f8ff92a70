"""The cache folder and the keys of what lies in it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from cakeflow.errors import ConfigError


def cache_folder() -> Path:
    """Folder of converted weights, corpora, statistics and traces: ``$CAKEFLOW_CACHE`` or ``~/.cache/cakeflow``."""
    return Path(os.environ.get("CAKEFLOW_CACHE") or Path.home() / ".cache" / "cakeflow")


def require_writable(folder: Path) -> Path:
    """Make a folder in the cache, before the work whose result goes there.

    Raises:
        ConfigError: If nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise ConfigError(
            f"the cache {folder} cannot be written: {error}; set CAKEFLOW_CACHE to a folder that can"
        ) from error
    return folder


def content_key(*parts: Any) -> str:
    """SHA-256 of the canonical JSON of everything that decides a cached result.

    Args:
        parts: Texts, numbers, booleans, None, bytes, and lists, tuples and dictionaries of these. Tuples count as
            lists; the sequence of a dictionary's fields makes no difference.

    Returns:
        64 hexadecimal digits.

    Raises:
        TypeError: If a part is of another type: its text could differ from one process to the next.

    Example:
        >>> content_key("model", {"window": 512, "seed": 0}) == content_key("model", {"seed": 0, "window": 512})
        True
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=_bytes_hash)
    return hashlib.sha256(text.encode()).hexdigest()


def _bytes_hash(part: object) -> dict[str, str]:
    if not isinstance(part, bytes):
        raise TypeError(f"a content key is made of JSON values and bytes, not of {type(part).__name__}: {part!r}")
    return {"sha256": hashlib.sha256(part).hexdigest()}
