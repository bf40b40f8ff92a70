"""Who ran something, where, and with which versions."""

from __future__ import annotations

import getpass
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from cakeflow.errors import visible
from cakeflow.journal.schema import Circumstances

PACKAGES = ("cakeflow", "torch", "transformers", "lightning")


def circumstances() -> Circumstances:
    """Who runs this, where, and with what; it may differ when a run goes on."""
    versions = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    return Circumstances(who=who(), versions=versions, threads=torch.get_num_threads(), machine=machine())


def machine() -> dict[str, str]:
    """What decides the last bits of sums beside versions: system, processor, the vectors that torch uses, the GPU."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        **gpu,
    }


def processor() -> str:
    """Name of the processor's model, where the system tells it."""
    description = Path("/proc/cpuinfo")
    lines = description.read_text(encoding="utf-8", errors="replace").splitlines() if description.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return visible(next(names, platform.processor()))


def who() -> str:
    """Account and machine, and the user that the environment claims (``LOGNAME``, ``USER``) if it is another one."""
    account = _account()
    try:
        claim = visible(getpass.getuser())[:64]
    except (OSError, KeyError, ImportError):  # nothing is claimed; before Python 3.13 Windows lacks a module then
        claim = account
    return f"{account}@{platform.node()}" + (f" (environment: {claim})" if claim != account else "")


def _account() -> str:
    """Name of the account that the system runs this process under."""
    try:
        import pwd  # not on Windows, where ``getlogin`` asks the system as well
    except ImportError:
        return os.getlogin()
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container's user without a name
        return f"uid {os.geteuid()}"
