"""The command ``cakeflow``, also as ``python -m cakeflow``; its main page and version need no torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from io import TextIOWrapper

import cakeflow
from cakeflow.cli.help import page_for


def main(args: Sequence[str] | None = None) -> None:
    """Run the console script; returns nothing, because a result would become the exit status.

    Args:
        args: Words after the program's name; by default those of the process.
    """
    words = sys.argv[1:] if args is None else args
    if isinstance(sys.stdout, TextIOWrapper):  # in a file it may have an encoding without some signs, as cp1252
        sys.stdout.reconfigure(errors="backslashreplace")
    if text := f"cakeflow {cakeflow.__version__}" if [*words] == ["--version"] else page_for(words):
        sys.stdout.write(f"{text}\n")
    else:
        from cakeflow.cli.command_line import run_command  # takes seconds

        run_command(words)


if __name__ == "__main__":
    main()
