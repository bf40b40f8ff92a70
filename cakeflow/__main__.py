"""The command ``cakeflow``, also as ``python -m cakeflow``; its main page and version need no torch."""

import sys

import cakeflow
from cakeflow.cli.help import page_for


def main() -> None:
    """Run the console script; returns nothing, because a result would become the exit status."""
    words = sys.argv[1:]
    if text := f"cakeflow {cakeflow.__version__}" if words == ["--version"] else page_for(words):
        sys.stdout.write(f"{text}\n")
    else:
        from cakeflow.cli.command_line import run_command  # takes seconds

        run_command(words)


if __name__ == "__main__":
    main()
