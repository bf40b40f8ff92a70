"""The command line."""

from cakeflow.cli.command_line import main, run

__all__ = ["main", "run"]
