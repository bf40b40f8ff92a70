"""One process at a time writes, and the others learn who does."""

import logging
import os
import platform
import signal
import threading
import time

import psutil
import pytest

from cakeflow.errors import LockedError
from cakeflow.storage.locks import locked


class Holder:
    """A process that holds a lock until it is told to go on, or killed."""

    def __init__(self, path):
        ready, messages = os.pipe()
        go, self.go = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            with locked(path):
                os.write(messages, b"!")
                os.read(go, 1)
            os._exit(0)
        os.read(ready, 1)

    def end(self, number=None):
        if number is None:
            os.write(self.go, b"!")
        else:
            os.kill(self.pid, number)
        os.waitpid(self.pid, 0)


def test_others_are_told_whose_it_is(tmp_path):
    holder = Holder(tmp_path / "run")
    with pytest.raises(LockedError) as error, locked(tmp_path / "run"):
        pass
    assert f"{psutil.Process().username()}@{platform.node()}, process {holder.pid}, since " in str(error.value)
    assert str(tmp_path / "run") in str(error.value)
    holder.end()
    with locked(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    holder = Holder(tmp_path / "run")
    holder.end(signal.SIGKILL)
    assert len(list(tmp_path.iterdir())) == 2
    with locked(tmp_path / "run"):
        assert f"process {os.getpid()}," in (tmp_path / ".run.owner").read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_thread_may_lock_again_and_another_may_not(tmp_path):
    errors = []

    def other():
        try:
            with locked(tmp_path / "run"):
                pass
        except LockedError as error:
            errors.append(error)

    with locked(tmp_path / "run"):
        with locked(tmp_path / "run"):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(errors) == 1
    other()
    assert len(errors) == 1


def test_waiting_is_announced_and_ends(tmp_path, caplog):
    holder = Holder(tmp_path / "cache")
    timer = threading.Timer(0.2, holder.end)
    start = time.monotonic()
    with caplog.at_level(logging.INFO, "cakeflow"):
        timer.start()
        with locked(tmp_path / "cache", wait=True):
            assert time.monotonic() - start > 0.15
    assert f"process {holder.pid}" in caplog.text
    timer.join()


def test_a_lock_is_freed_by_an_error(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "new" / "run"):
        raise KeyError
    with locked(tmp_path / "new" / "run"):
        pass
