"""The family of errors that cakeflow raises; each message names the item, its value and a remedy."""

from __future__ import annotations

import json
import numbers
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from typing import Any, get_args

MOST = 10
"""Faults that a message names; if there are more, a file has all of them."""


def counted(number: int, noun: str) -> str:
    """Return a number of things in words.

    Example:
        >>> counted(1, "fact"), counted(2, "fact")
        ('1 fact', '2 facts')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def listed(values: Sequence[object], most: int = 10) -> str:
    """Join values for a message, each in one line: the first ``most`` of them and the number of the others.

    Example:
        >>> listed([3, 5, 8], most=2)
        '3, 5 and 1 more'
    """
    texts = (visible(_shown(value, str)) for value in values[:most])
    return ", ".join(texts) + (f" and {len(values) - most} more" if len(values) > most else "")


def _shown(value: object, text: Callable[[object], str]) -> str:
    """Return a value as text, whatever it is."""
    try:
        return text(value)
    except Exception:  # nested too deeply, a number of too many digits, or an object that cannot say what it is
        return f"a {type(value).__name__} that cannot be shown"


def visible(text: str, *, lines: bool = False) -> str:
    r"""Return a text with escapes for what a terminal would obey instead of showing it.

    These are control characters, line ends, and marks that change the writing direction.

    Args:
        text: The text.
        lines: Whether its line feeds stay.

    Example:
        >>> print(visible("innocent\x1b[2K"))
        innocent\u001b[2K
    """
    if lines:
        return "\n".join(map(visible, text.split("\n")))
    return "".join(sign if sign.isprintable() else json.dumps(sign)[1:-1] for sign in text)


def command_line(words: Sequence[str]) -> str:
    """Return a command of cakeflow as a shell of this system takes it, for a message to copy it from.

    Args:
        words: Those after the program's name.

    Example:
        >>> command_line(["report", "my run"])
        "cakeflow report 'my run'"
    """
    words = ["cakeflow", *words]
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


def did_you_mean(value: object, names: Iterable[str]) -> str:
    """Return the end of a message that proposes the names nearest to a value; empty if none is near, or it is one.

    Example:
        >>> "no method 'caek'" + did_you_mean("caek", ["cake", "memit"])
        "no method 'caek'; did you mean 'cake'?"
    """
    near = [] if value in (names := sorted(set(names))) else get_close_matches(str(value), names, n=3)
    ratios = [SequenceMatcher(None, name, str(value)).ratio() for name in near]
    near = [name for name, ratio in zip(near, ratios, strict=True) if ratio > ratios[0] - 0.1]
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def with_faults(head: str, faults: Sequence[object]) -> str:
    """Return a message with the first faults and, if there are more, the name of a temporary file with all of them."""
    lines = [head, *map(str, faults[:MOST])]
    if len(faults) > MOST:
        lines.append(f"and {len(faults) - MOST} more{_listing(faults)}")
    return "\n  ".join(lines)


def _listing(faults: Sequence[object]) -> str:
    """Write faults to a file that only its owner can read, and return the end of a message that names it."""
    try:
        descriptor, path = tempfile.mkstemp(".txt", "cakeflow-faults-")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(f"{fault}\n" for fault in faults)
    except OSError:  # a full disk is no reason to hide the first faults
        return ""
    return f"; all of them: {path}"


class EditError(Exception):
    """Base of every error that cakeflow raises on purpose; its message is safe to show (``visible``)."""

    def __str__(self) -> str:
        return visible(super().__str__(), lines=True)


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault in one entry of a list of requests.

    Attributes:
        index: Position of the entry in the list, from 0 (or the line number, from 1, of a file).
        field: Name of the faulty field.
        value: Its value.
        remedy: Advice on how to correct it.
    """

    index: int
    field: str
    value: object
    remedy: str

    def __str__(self) -> str:
        value = _shown(self.value, repr)
        return f"entry {self.index}, {self.field} = {value[:77] + '...' if len(value) > 80 else value}: {self.remedy}"


class RequestError(EditError, ValueError):
    """Requests that cannot be edited; nothing was changed.

    Args:
        faults: All faults of all entries.
    """

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__(with_faults(f"{len(faults)} problem(s) in the requests; nothing was changed:", self.faults))

    def __reduce__(self) -> tuple[type[RequestError], tuple[tuple[Fault, ...]]]:
        return type(self), (self.faults,)  # to another process


class ArchitectureError(EditError, ValueError):
    """A model whose blocks, projections or output head cannot be located."""


class ShapeError(EditError, ValueError):
    """A tensor whose shape breaks the contract of a slot."""


class StatisticsError(EditError, ValueError):
    """Second moments that cannot be collected, are damaged or do not fit the model."""


class ConfigError(EditError, ValueError):
    """A setting that names something unknown or contradicts another."""


class JudgeError(EditError, ValueError):
    """A judge of free answers that gives no verdict."""


class RunFolderError(EditError, ValueError):
    """A folder that is not a run folder, or a run folder with a broken file."""


class LedgerError(RunFolderError):
    """A ledger that was changed after it was written, or files that differ from those it lists."""


class LockedError(EditError, RuntimeError):
    """Something that another process, or another thread, is writing at the moment."""


class ResumeError(EditError, ValueError):
    """A run that cannot be resumed, because its model, data or settings differ."""


class RanksError(EditError, RuntimeError):
    """Ranks that differ in model, settings or files, or one that was lost."""


class ModelChangedError(EditError, RuntimeError):
    """A model that somebody else changed since its journal did; nothing was done."""


class ExportError(EditError, ValueError):
    """An export that cannot be made, that was changed, or that does not belong to the model."""


class PolicyError(EditError, PermissionError):
    """Edits that a policy does not allow, or whose outcome breaks it."""


class PluginError(EditError, ImportError):
    """Installed plugins that cannot be used."""


class NumericalError(EditError, ArithmeticError):
    """A failed solve or values that are not finite; the edits of the batch were taken back."""


class AllocationWarning(UserWarning):
    """The exact allocation of a fact was not solved to its tolerance; the best iterate was used."""


class RequestWarning(UserWarning):
    """Requests that can be edited but are probably not meant as they stand."""


class NotTakenWarning(UserWarning):
    """A fact did not take: after its edit the model does not answer its own prompt with the target."""


class BlockedWarning(UserWarning):
    """A fact cannot be written alone: every token that it could be written at carries a massive activation."""


class ArrivalWarning(UserWarning):
    """Too little of a fact's searched change arrived at its value site, so the edit may not have taken."""


class TargetNormWarning(UserWarning):
    """Target values whose norm was far from the one that all have to have: facts left as they are, or much stronger."""


class SideEffectWarning(UserWarning):
    """A run changed more than its budget allows of what the model says beside the edited facts."""


class SharedKeyWarning(UserWarning):
    """Facts have the same key: those of one batch share a value, that of a later one takes an earlier one's place."""


def require_choice(name: str, value: object, literal: Any) -> None:
    """Check a setting that has a few possible values.

    Args:
        name: The setting.
        value: Its value.
        literal: A ``Literal`` type of the possible ones.

    Raises:
        ConfigError: If the value is none of them.
    """
    if value not in get_args(literal):
        choices = get_args(literal)
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}{did_you_mean(value, choices)}")


def require_count(name: str, value: object, least: int = 0, *, optional: bool = False) -> None:
    """Check a setting that is a whole number.

    Args:
        name: The setting.
        value: Its value.
        least: The smallest number that is allowed.
        optional: Whether None is allowed as well.

    Raises:
        ConfigError: If the value is no whole number (a truth value is none), or less than that.
    """
    if value is None and optional:
        return
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}")


def has_surrogate(text: str) -> bool:
    r"""Return whether a text has a lone surrogate, which no file holds and no tokenizer takes.

    Example:
        >>> has_surrogate("a\ud800"), has_surrogate("\U0001f355")
        (True, False)
    """
    return any("\ud800" <= sign <= "\udfff" for sign in text)


def require_positive(owner: str, settings: object, *names: str) -> None:
    """Check settings that are numbers above 0, or None where that is possible.

    Args:
        owner: What the settings belong to, as a config names it.
        settings: Object with the settings as attributes.
        *names: The attributes.

    Raises:
        ConfigError: If one of them is a number that is not above 0.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{owner}.{name} must be above 0, got {value}")
