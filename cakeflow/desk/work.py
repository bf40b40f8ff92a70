"""One job at a time for the model, in one thread, while other threads ask how it goes."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from lightning.pytorch.profilers import Profiler

from cakeflow.errors import EditError, LockedError, RequestError

log = logging.getLogger(__name__)
PHASES = {
    "evaluation": "Asking the model",
    "ask": "Checking what it states",
    "trace": "Choosing layers",
    "statistics": "Collecting second moments (once per model, then cached)",
    "targets": "Searching the value of the fact",
    "keys": "Reading keys",
    "allocate": "Sharing the change among layers",
    "solve": "Solving for the change",
}
"""Phases of an edit module, in words."""
TURN = 0.5
"""Seconds between two looks for a job; on Windows a wait without an end cannot be interrupted."""
MOST_JOBS = 20
"""Finished jobs whose results stay."""


@dataclass
class Job:
    """A job and how it goes.

    Attributes:
        number: Number of the job.
        title: Name of the job for people.
        call: The work.
        state: ``waiting``, ``running``, ``done`` or ``failed``.
        steps: What it was at so far, in words, each once in a row, with the times that it was begun.
        result: Its result, once it is done.
        error: Why it failed: ``kind``, ``message`` and the faults of single ``fields``.
        start: Time at which it was handed in (monotonic).
        seconds: How long it took; None until it has ended.
    """

    number: int
    title: str
    call: Callable[[], Any]
    state: str = "waiting"
    steps: list[dict[str, Any]] = field(default_factory=list)
    result: Any = None
    error: dict[str, Any] | None = None
    start: float = field(default_factory=time.monotonic)
    seconds: float | None = None

    def view(self) -> dict[str, Any]:
        """The job as JSON-ready data."""
        names = ("number", "title", "state", "result", "error")
        seconds = time.monotonic() - self.start if self.seconds is None else self.seconds
        steps = [dict(step) for step in self.steps]
        return {**{name: getattr(self, name) for name in names}, "steps": steps, "seconds": round(seconds, 1)}


class Worker:
    """Runs jobs in the thread that calls ``run``: a model and its journal belong to one thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ready = threading.Event()
        self._numbers = count(1)
        self._jobs: deque[Job] = deque(maxlen=MOST_JOBS)
        self._next: Job | None = None
        self._closed = False

    def submit(self, title: str, call: Callable[[], Any]) -> int:
        """Hand in a job and return its number.

        Args:
            title: Name of the job for people.
            call: The work; its result is JSON-ready.

        Raises:
            LockedError: If another job is waiting or running, or the worker has ended.
        """
        with self._lock:
            if self._closed:
                raise LockedError("the page was closed in its terminal; start it again")
            if self._next is not None:
                raise LockedError(f"the model is at work ({self._next.title}); wait until that is done")
            self._next = Job(next(self._numbers), title, call)
            self._jobs.append(self._next)
            self._ready.set()
            return self._next.number

    def view(self, number: int) -> dict[str, Any] | None:
        """A job as JSON-ready data; None if there is none of that number any more."""
        with self._lock:
            return next((job.view() for job in self._jobs if job.number == number), None)

    @property
    def busy(self) -> int | None:
        """Number of the job that is waiting or running."""
        with self._lock:
            return self._next.number if self._next else None

    def step(self, words: str) -> None:
        """Note what the job is at."""
        with self._lock:
            if self._next is None:
                return
            steps = self._next.steps
            if steps and steps[-1]["words"] == words:
                steps[-1]["times"] += 1
            else:
                steps.append({"words": words, "times": 1})

    def run(self) -> None:
        """Do jobs until ``close``; an interrupt ends the present one as it would any run, and is raised.

        A job that fails leaves its error; the next one is done all the same.
        """
        try:
            while not self._closed:
                if self._ready.wait(TURN) and self._next is not None:
                    self._do(self._next)
        finally:
            self.close()

    def close(self) -> None:
        """Take no further job; ``run`` returns behind the present one."""
        with self._lock:
            self._closed = True
            self._ready.set()

    def _do(self, job: Job) -> None:
        job.state, result, error = "running", None, None
        try:
            result = job.call()
        except EditError as known:
            error = error_view(known)
        except Exception as unknown:  # whatever a library raises: the next job is to have its chance
            log.exception("%s failed", job.title)
            error = {
                "kind": type(unknown).__name__,
                "message": f"{unknown}; the terminal has the details",
                "fields": [],
            }
        except BaseException:  # an interrupt
            error = {"kind": "Interrupt", "message": "interrupted in the terminal; nothing of it stays", "fields": []}
            raise
        finally:
            with self._lock:
                job.result, job.error, job.state = result, error, "failed" if error else "done"
                job.seconds = time.monotonic() - job.start
                self._next = None
                if not self._closed:
                    self._ready.clear()


def error_view(error: EditError) -> dict[str, Any]:
    """An error as JSON-ready data, with the faults of single fields where it names some."""
    faults = error.faults if isinstance(error, RequestError) else ()
    fields = [{"field": each.field, "remedy": each.remedy} for each in faults]
    return {"kind": type(error).__name__, "message": str(error), "fields": fields}


class PhaseProfiler(Profiler):
    """Tells, through Lightning's profiler, which phase of an edit module begins.

    Args:
        notify: Called with the phase in words.
        phases: Phase -> words.
    """

    def __init__(self, notify: Callable[[str], None], phases: Mapping[str, str] = PHASES) -> None:
        super().__init__()
        self.notify, self.phases = notify, phases

    def start(self, action_name: str) -> None:
        """Notify of a phase of ours."""
        room, _, phase = action_name.partition("/")
        if room == "cakeflow" and phase in self.phases:
            self.notify(self.phases[phase])

    def stop(self, action_name: str) -> None:
        """Do nothing: a phase ends where the next one begins."""

    def summary(self) -> str:
        """Return nothing: times are in the run's own record."""
        return ""
