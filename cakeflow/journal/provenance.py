"""Who ran something, where, and with which versions."""

from __future__ import annotations

import getpass
import platform
from importlib.metadata import version

import torch

from cakeflow.journal.schema import Circumstances

PACKAGES = ("cakeflow", "torch", "transformers", "lightning")


def circumstances() -> Circumstances:
    """Who runs this, where, and with what; it may differ when a run goes on."""
    try:
        who = getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        who = "unknown"
    versions = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    return Circumstances(who=f"{who}@{platform.node()}", versions=versions, threads=torch.get_num_threads())
