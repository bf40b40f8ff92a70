"""The cache folder."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where converted weights, corpora and statistics are kept: ``$CAKEFLOW_CACHE`` or ``~/.cache/cakeflow``."""
    return Path(os.environ.get("CAKEFLOW_CACHE") or Path.home() / ".cache" / "cakeflow")
