from .command_line import run_command

__all__ = ["run_command"]
