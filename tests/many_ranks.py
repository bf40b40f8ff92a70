"""Several ranks on this machine: processes that are forked with the variables that torchrun sets, over gloo."""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE, LONGEST = 60.0, 240.0
"""Seconds within which every rank has ended once one of them has died, and those that all may take."""
_ports = count()


@dataclass(frozen=True)
class Ended:
    """The end of one rank.

    Attributes:
        status: 0, 1 after an error, or the negative number of the signal that killed it.
        result: What it returned, or the error.
    """

    status: int
    result: Any


def free_port() -> int:
    """Return a port that no other worker of the tests takes meanwhile, nor the system for a connection of its own."""
    start = 20_000 + 1_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    for port in (start + next(_ports) % 1_000 for _ in range(1_000)):
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no port is free")


def in_ranks(size: int, work: Callable[[int], Any], folder: Path) -> list[Ended]:
    """Run a function of the rank's number in so many processes; what is not done after ``LONGEST`` is a failure.

    A rank that has succeeded stays until the others have, too: the first holds the store by which they meet.
    """
    port, ends = free_port(), os.pipe()
    children = [_forked(rank, size, port, work, folder, ends) for rank in range(size)]
    paths = [folder / f"rank-{rank}" for rank in range(size)]
    statuses, end = dict[int, int](), time.monotonic() + LONGEST
    with os.fdopen(ends[0]), os.fdopen(ends[1], "w") as stay:
        while len(statuses) < size:
            for child in set(children) - set(statuses):
                process, status = os.waitpid(child, os.WNOHANG)
                if process:
                    code = statuses[child] = os.waitstatus_to_exitcode(status)
                    end = min(end, time.monotonic() + PATIENCE) if code else end
            if all(child in statuses or path.exists() for child, path in zip(children, paths, strict=True)):
                stay.close()
            if time.monotonic() > end:
                for child in set(children) - set(statuses):
                    os.kill(child, signal.SIGKILL)
                raise AssertionError(f"ranks hang: {statuses}")
            time.sleep(0.01)
    results = [ForkingPickler.loads(path.read_bytes()) if path.exists() else None for path in paths]
    for path in paths:
        path.unlink(missing_ok=True)
    return [Ended(statuses[child], result) for child, result in zip(children, results, strict=True)]


def _forked(rank: int, size: int, port: int, work: Callable[[int], Any], folder: Path, ends: tuple[int, int]) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    os.close(ends[1])
    faulthandler.enable(2)  # a rank that a library kills says where, behind the failure of its test
    try:
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in own.items()}
        os.environ |= {"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "tests"}
        torch.set_num_threads(1)
        try:
            result = work(rank)
            status = 0
        except BaseException as error:
            result = error
            traceback.print_exc()
        (folder / f"rank-{rank}").write_bytes(bytes(ForkingPickler.dumps(result)))
        if not status:
            os.read(ends[0], 1)  # ends when the pipe is closed
    finally:
        os._exit(status)


def start_gloo() -> None:
    """Join the other ranks, as Lightning does it."""
    dist.init_process_group("gloo")
