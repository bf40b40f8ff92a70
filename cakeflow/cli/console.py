"""Output of the commands: what others wrote is shown, never obeyed."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from tqdm import tqdm

from cakeflow.errors import visible


def say(text: str, end: str = "\n") -> None:
    """Print a plain text: no markup, and escapes for what a terminal would obey."""
    Console().print(visible(text), end=end, soft_wrap=True, markup=False)


class LogHandler(logging.Handler):
    """Writes log messages to stderr, unbroken and beside the bars, so that a command in one can be copied.

    They have escapes for what a terminal would obey; their line feeds stay.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(message)s"))  # or ``basicConfig`` gives it one with the names of files

    def emit(self, record: logging.LogRecord) -> None:
        """Write the message of a record, behind its level if that is a warning or worse."""
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        with tqdm.external_write_mode(file=sys.stderr):
            sys.stderr.write(level + visible(self.format(record), lines=True) + "\n")


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Show warnings in the body as one message each, without the place in the source."""

    def one_message(message: Warning | str, *_: Any, **__: Any) -> str:
        return f"warning: {visible(str(message), lines=True)}\n"

    before, warnings.formatwarning = warnings.formatwarning, one_message
    try:
        yield
    finally:
        warnings.formatwarning = before
