"""The errors a user can meet: one family, each message naming the item, the value and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


def listed(values: Sequence[object], most: int = 10) -> str:
    """Values in a row, for a message: the first ``most`` of them, and how many more there are.

    Example:
        >>> listed([3, 5, 8], most=2)
        '3, 5 and 1 more'
    """
    return ", ".join(map(str, values[:most])) + (f" and {len(values) - most} more" if len(values) > most else "")


class EditError(Exception):
    """Base of every error that cakeflow raises on purpose."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault in one entry of a list of requests.

    Attributes:
        index: Position of the entry in the list, from 0 (or the line number, from 1, of a file).
        field: Field of the entry that is at fault.
        value: What was found there.
        remedy: What to do about it.
    """

    index: int
    field: str
    value: object
    remedy: str

    def __str__(self) -> str:
        try:
            shown = repr(self.value)
        except Exception:  # nested too deeply, a number of too many digits, or an object that cannot say what it is
            shown = f"a {type(self.value).__name__} that cannot be shown"
        return f"entry {self.index}, {self.field} = {shown[:77] + '...' if len(shown) > 80 else shown}: {self.remedy}"


class RequestError(EditError, ValueError):
    """Requests that cannot be edited; nothing was changed.

    Args:
        problems: Every fault found, over the whole list.
    """

    def __init__(self, problems: Sequence[Fault]) -> None:
        self.problems = tuple(problems)
        head = f"{len(self.problems)} problem(s) in the requests; nothing was changed:"
        super().__init__("\n  ".join([head, *map(str, self.problems)]))


class ArchitectureError(EditError, ValueError):
    """A model whose blocks, projections or head could not be found."""


class ShapeError(EditError, ValueError):
    """A tensor whose shape breaks the contract of a slot."""


class StatisticsError(EditError, ValueError):
    """Second moments that are missing, too few or do not fit the model."""


class ConfigError(EditError, ValueError):
    """A setting that names something unknown or contradicts another."""


class RunFolderError(EditError, ValueError):
    """A run folder that is none, or that has a broken file."""


class LedgerError(RunFolderError):
    """A ledger that was changed after it was written, or files that are not those it tells of."""


class ResumeError(EditError, ValueError):
    """A run that cannot go on where it stopped, because something differs."""


class ExportError(EditError, ValueError):
    """An export that cannot be made, that was changed, or that does not belong to the model."""


class PolicyError(EditError, PermissionError):
    """Edits that a policy does not allow, or whose outcome breaks it."""


class PluginError(EditError, ImportError):
    """Installed plugins that cannot be used."""


class NumericalError(EditError, ArithmeticError):
    """A solve that failed or values that are not finite; the batch was taken back."""
