"""The command line."""

from cakeflow.cli.command_line import main, run_command

__all__ = ["main", "run_command"]
