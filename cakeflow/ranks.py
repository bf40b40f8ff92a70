"""Work that is spread over ranks: processes with the same model, as Lightning started them for ``torch.distributed``.

The functions act together inside ``together`` only. Elsewhere, and in one process, each of them just does the work, so
that what one rank does alone never waits for others.

Every exchange is one ``all_gather_object`` with a name. So ranks that are at different exchanges learn it at once, in
place of waiting for each other, and a rank that failed is heard at whatever exchange the others are.
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, is_dataclass, replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch.distributed as dist
from torch import Tensor

from cakeflow.errors import RanksError, listed
from cakeflow.storage.atomic import make_folder, uninterrupted

P = TypeVar("P")
R = TypeVar("R")
State = Literal["apart", "together", "lockstep", "part"]
_state: ContextVar[State] = ContextVar("ranks", default="apart")
FAILED = "a failure"
"""Name of the exchange of ranks that failed."""


@contextmanager
def together(*, lockstep: bool = False) -> Iterator[None]:
    """Have the ranks work together in the body, which all of them run; one process is a rank by itself.

    Of the warnings that all of them have reason for, the first rank's are shown.

    Args:
        lockstep: Whether no work is dealt out: every rank runs every part, as those with parts of one model must.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    state: State = "lockstep" if lockstep else "together"
    with _being(state if several else "apart"), warnings.catch_warnings():
        if not is_first():
            warnings.simplefilter("ignore", UserWarning)
        try:
            yield
        except RuntimeError as error:  # of weights that could not be gathered, perhaps
            if lockstep and not rejoin(error):
                raise _lost("a pass", error) from error
            raise


@contextmanager
def alone() -> Iterator[None]:
    """Do the body without the other ranks, as what one rank does for all of them is done."""
    with _being("apart" if _state.get() == "apart" else "part"):
        yield


@contextmanager
def _being(state: State) -> Iterator[None]:
    token = _state.set(state)
    try:
        yield
    finally:
        _state.reset(token)


def world_size() -> int:
    """Return to how many ranks work is dealt out; 1 in one process, in lockstep, and in what one rank does alone."""
    return dist.get_world_size() if _state.get() == "together" else 1


def _exchanges() -> bool:
    return _state.get() in ("together", "lockstep")


def rank() -> int:
    """Return the number of this rank; 0 outside ``together``."""
    return 0 if _state.get() == "apart" else dist.get_rank()


def are_joined() -> bool:
    """Return whether this is one of several ranks in ``together``, also while it does something alone."""
    return _state.get() != "apart"


def is_first() -> bool:
    """Return whether this is rank 0, which alone writes files and shows progress."""
    return rank() == 0


def spread(parts: Sequence[P], run: Callable[[P], R]) -> list[R]:
    """Run every part on one rank, and return the results of all of them on every rank, in the order of the parts.

    Part i is run by rank ``i % world_size()``; so the parts, and with them the bits of the results, must not depend on
    the number of ranks. In one process this is a plain loop.

    Args:
        parts: The parts, the same on every rank.
        run: Function of a part; with several ranks its tensors come back on the CPU.

    Raises:
        BaseException: What the earliest failing part raised, on every rank.
        RanksError: If a rank was lost, or is elsewhere.
    """
    if world_size() == 1:
        return [run(part) for part in parts]
    results: dict[int, R] = {}
    failure: tuple[int, BaseException] | None = None
    with warnings.catch_warnings(record=not is_first()) as records:
        if not is_first():
            warnings.simplefilter("always", UserWarning)
        for place in range(rank(), len(parts), world_size()):
            try:
                with alone():
                    results[place] = _on_cpu(run(parts[place]))
            except BaseException as error:
                failure = place, error
                break
    notes = [(str(each.message), each.category) for each in records or ()]
    lost = None if failure is None else (failure[0], _portable(failure[1]))
    gathered = _exchange(f"{len(parts)} parts", (results, lost, notes))
    for words, kind in (note for _, _, each in gathered for note in each):
        warnings.warn(words, kind, stacklevel=2)
    failures = [each for _, each, _ in gathered if each is not None]
    if failures:
        place, earliest = min(failures, key=lambda each: each[0])
        raise failure[1] if failure is not None and failure[0] == place else earliest
    whole: dict[int, R] = {place: result for each, _, _ in gathered for place, result in each.items()}
    return [whole[place] for place in range(len(parts))]


def in_rounds(parts: Sequence[P]) -> Iterator[Sequence[P]]:
    """Yield as many parts at a time as there are ranks, for results that are used as they come; one by one alone."""
    size = world_size()
    for start in range(0, len(parts), size):
        yield parts[start : start + size]


def on_first(run: Callable[[], R]) -> R:
    """Run something on rank 0, and return its result on every rank; tensors come to the others on the CPU.

    Raises:
        BaseException: What it raised, on every rank.
        RanksError: If a rank was lost, or is elsewhere.
    """
    if not _exchanges():
        return run()
    result: Any = None
    failure: BaseException | None = None
    if is_first():
        try:
            with alone():
                result = run()
        except BaseException as error:
            failure = error
    outcome = _on_cpu(result), None if failure is None else _portable(failure)
    answer, reason = _exchange("what rank 0 does", outcome if is_first() else (None, None))[0]
    if reason is not None:
        raise failure or reason
    return result if is_first() else answer  # type: ignore[no-any-return]


def agree(value: object, what: str) -> None:
    """Check that a value is the same on every rank.

    Args:
        value: The value; of a mapping, the names whose values differ are named.
        what: What it is, in the message.

    Raises:
        RanksError: On every rank, if they differ.
    """
    if not _exchanges():
        return
    values = _exchange(f"the comparison of {what}", value)
    for other, each in enumerate(values):
        if each != values[0]:
            raise RanksError(
                f"ranks differ in {what}: {_difference(values[0], each, other)}; nothing was changed: start every rank "
                "with the same command, files, versions and kind of machine"
            )


def add_up(numbers: Tensor, what: str) -> None:
    """Add up a tensor of whole numbers over the ranks, in place: their sum is the same in whatever order.

    Args:
        numbers: The rank's own part, of the same shape on every rank, and no wider than the sum.
        what: What it is, in messages.

    Raises:
        RanksError: If a rank was lost, or is elsewhere.
    """
    if world_size() == 1:
        return
    _exchange(f"the sum of {what}", None)
    host = numbers.cpu()
    dist.all_reduce(host)
    numbers.copy_(host)


def barrier(name: str = "a barrier") -> None:
    """Wait until every rank is here."""
    if _exchanges():
        _exchange(name, None)


def rejoin(error: BaseException) -> bool:
    """After an error of perhaps one rank, have every rank raise; return whether all of them are still there.

    The others raise this error at their next exchange, and come here themselves.

    Args:
        error: What this rank raises.
    """
    if not _exchanges():
        return True
    try:
        while not _all_failed(_gather(FAILED, _portable(error))):
            pass
    except RanksError:
        return False
    return True


def require_shared(folder: Path, what: str) -> None:
    """Check that a folder is the same one on every rank.

    Args:
        folder: The folder; it is made.
        what: Its name in the message.

    Raises:
        RanksError: On every rank, if it is not.
    """
    if not _exchanges():
        return
    mark = folder / on_first(lambda: _leave_mark(folder))
    looks = _exchange(f"a look at the {what}", (str(folder), mark.exists()))
    on_first(lambda: mark.unlink(missing_ok=True))
    if blind := [place for place, (_, sight) in enumerate(looks) if not sight]:
        raise RanksError(
            f"the {what} {looks[0][0]} of rank 0 is not that of rank {listed(blind)}: the ranks share no such folder; "
            "name one on a file system that all of them see"
        )


def _leave_mark(folder: Path) -> str:
    make_folder(folder)
    name = f".cakeflow-{secrets.token_hex(8)}"
    (folder / name).touch()
    return name


def _difference(first: object, other: object, rank: int) -> str:
    if isinstance(first, Mapping) and isinstance(other, Mapping):
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        return f"{names[0]} is {listed([first.get(names[0])])} on rank 0 and {listed([other.get(names[0])])} on " + (
            f"rank {rank}" + (f" ({listed(names[1:], 5)} differ too)" if names[1:] else "")
        )
    return f"{listed([first])} on rank 0 and {listed([other])} on rank {rank}"


def _exchange(name: str, value: object) -> list[Any]:
    """Return the values of all ranks, which are all at this exchange.

    Raises:
        BaseException: The failure of a rank that is not.
        RanksError: If ranks are at different exchanges, or one was lost.
    """
    gathered = _gather(name, value)
    failures = [each for other, each in gathered if other == FAILED]
    if failures:
        raise failures[0]
    if len({other for other, _ in gathered}) > 1:
        places = [f"rank {number} at {other}" for number, (other, _) in enumerate(gathered)]
        raise RanksError(f"ranks went apart: {listed(places)}; start every rank with the same command and files")
    return [each for _, each in gathered]


def _gather(name: str, value: object) -> list[tuple[str, Any]]:
    """Return what every rank is at, and its value.

    Raises:
        RanksError: If a rank was lost.
    """
    gathered: list[Any] = [None] * dist.get_world_size()
    try:
        with uninterrupted():
            dist.all_gather_object(gathered, (name, value))
    except RuntimeError as error:
        raise _lost(name, error) from error
    return gathered


def _lost(name: str, error: Exception) -> RanksError:
    reason = (str(error).splitlines() or ["no reason"])[0]
    return RanksError(
        f"rank {dist.get_rank()} lost another one at {name} ({reason}); what was acknowledged is stored: give the "
        "same command again, with any number of ranks"
    )


def _all_failed(gathered: Sequence[tuple[str, Any]]) -> bool:
    return all(name == FAILED for name, _ in gathered)


def _on_cpu(value: Any) -> Any:
    """Return a value with copies of its tensors on the CPU; a copy, because a view is sent with all of its storage."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(map(_on_cpu, value))
    if isinstance(value, dict):
        return {name: _on_cpu(each) for name, each in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        tensors = {each.name: part for each in fields(value) if isinstance(part := getattr(value, each.name), Tensor)}
        return replace(value, **_on_cpu(tensors)) if tensors else value
    return value


def _portable(error: BaseException) -> BaseException:
    """Return an error that another process can raise: this one, or its words."""
    try:
        ForkingPickler.loads(ForkingPickler.dumps(error))
    except Exception:  # whatever its class makes of it
        return RanksError(f"{type(error).__name__}: {error}")
    return error
