"""Stopping a program at a named moment, by the audit events that mark them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Stops:
    """What an audit hook does; a hook cannot be removed, so that there is one, idle as long as it is not armed.

    Attributes:
        seen: The moments since it was armed, as they came.
    """

    def __init__(self) -> None:
        self.error: type[BaseException] | signal.Signals | None = None
        self.after = -1
        self.armed = False
        self.seen: list[tuple[object, ...]] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[object, ...]) -> None:
        if not self.armed or not event.startswith("cakeflow."):
            return
        self.seen.append((event, *args))
        if len(self.seen) - 1 == self.after:
            if isinstance(self.error, signal.Signals):
                os.kill(os.getpid(), self.error)
            elif self.error is not None:
                raise self.error

    @contextmanager
    def at(self, place: int, error: type[BaseException] | signal.Signals | None) -> Iterator[None]:
        """Raise an error, or send a signal, at the moment of that number; None only watches."""
        self.seen, self.after, self.error, self.armed = [], place, error, True
        try:
            yield
        finally:
            self.armed = False


STOPS = Stops()
