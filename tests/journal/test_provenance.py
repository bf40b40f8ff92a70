"""Who ran something: what the system says, and what the environment claims beside it."""

import os
import platform
import pwd
from pathlib import Path

import pytest
import torch

from cakeflow.journal.provenance import circumstances, machine, processor, who

ACCOUNT = pwd.getpwuid(os.geteuid()).pw_name
NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_the_account_is_that_of_the_system():
    assert circumstances().who == who() == f"{ACCOUNT}@{platform.node()}"


@pytest.mark.parametrize("name", NAMES)
def test_a_claim_of_the_environment_stands_beside_it(monkeypatch, name):
    monkeypatch.setenv(name, ACCOUNT)
    assert who() == f"{ACCOUNT}@{platform.node()}"
    monkeypatch.setenv(name, "somebody\x1b[2J\udcff" + "x" * 500)
    account, claim = who().split(" (environment: ")
    assert account == f"{ACCOUNT}@{platform.node()}"
    assert claim.startswith("somebody\\u001b[2J\\udcff")
    assert len(claim) < 80
    assert circumstances().to_dict()["who"] == who()


def test_an_account_without_a_name_has_a_number(monkeypatch):
    def unknown(number):
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert who() == f"uid {os.geteuid()}@{platform.node()}"


def test_the_machine_is_that_of_the_system(monkeypatch):
    assert circumstances().machine == machine()
    assert machine()["system"] == f"{platform.system()} {platform.machine()}"
    assert machine()["vectors"] == torch.backends.cpu.get_cpu_capability()
    assert ("gpu" in machine()) == torch.cuda.is_available()
    monkeypatch.setattr(
        Path, "read_text", lambda *_, **__: "flags\t: avx\nmodel name\t: Fast: One\x1b\nmodel name : Two"
    )
    monkeypatch.setattr(Path, "exists", lambda _: True)
    assert processor() == "Fast: One\\u001b"
    monkeypatch.setattr(Path, "exists", lambda _: False)
    assert processor() == platform.processor()
