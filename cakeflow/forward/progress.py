"""Progress bars: one for each phase that takes the user's time, on terminals and in notebooks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import count
from typing import Any

from tqdm.auto import tqdm

from cakeflow.ranks import is_first

DELAY = 2.0
"""Seconds after which a bar appears: a phase that is done by then needs none."""


def progress_bar(total: int, title: str, unit: str, *, initial: int = 0, enabled: bool = True) -> Any:
    """Return a bar of tqdm over a phase; none where stderr is a file, and on the first rank only.

    Args:
        total: Number of units in the phase.
        title: What is done.
        unit: What is counted.
        initial: Number of units that were done earlier.
        enabled: Whether there is to be a bar at all.
    """
    visible = enabled and is_first() and (sys.stderr.isatty() or "ipykernel" in sys.modules)
    options = {"total": total, "desc": title, "unit": unit, "initial": initial, "delay": DELAY}
    # miniters: a step without a fact that is done is shown as well
    return tqdm(**options, miniters=0, leave=False, dynamic_ncols=True, disable=not visible)


def counting_steps(bar: Any) -> Callable[[int], None]:
    """Return a callback for the steps of a search: it gets how many facts are done since, and shows the step as well.

    Args:
        bar: A bar that counts facts.
    """
    steps = count(1)

    def advance(done: int) -> None:
        bar.set_postfix_str(f"step {next(steps)}", refresh=False)
        bar.update(done)

    return advance
