"""The command that lists the shipped methods."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from rich.console import Console

from cakeflow.cli.console import say
from cakeflow.core.config import shipped

ASIDE = re.compile(r" \([^()]*\)")
"""A source or a remark, which the list does without."""
END = re.compile(r"[.;](?= |$)")
"""What ends the first sentence of a comment."""


def run_recipes() -> list[str]:
    """List the shipped methods, one line each; any of them may stand behind ``--method``."""
    recipes = shipped("method")
    space, columns = max(map(len, recipes)) + 2, Console().width
    for name, path in recipes.items():
        say(f"{name:<{space}}{textwrap.shorten(summary(path), columns - space, placeholder=' ...')}")
    say("")
    say(f"Each file says what it follows and where it departs from it: {path.parent}")
    return [*recipes]


def summary(path: Path) -> str:
    """Return the first sentence of the comment at the head of a config, without what stands in parentheses.

    Args:
        path: The YAML file.

    Example:
        >>> summary(shipped("method")["memit_seq_blue"])
        'BLUE over MEMIT_seq: first and last layer, each with target values of its own'
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    head = ASIDE.sub("", " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#")))
    return END.split(head, maxsplit=1)[0]
