"""The audit of a run folder: its hashes, and whether its edits lead to the weights on record."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cakeflow.errors import ConfigError, EditError, LedgerError, RunFolderError
from cakeflow.journal.journal import Journal
from cakeflow.journal.ledger import Entry, bodies, whole_lines
from cakeflow.journal.policy import Policy
from cakeflow.journal.schema import BatchBody, EndBody, ModelBody, RollbackBody, RunBody
from cakeflow.journal.store import FROM_A_COPY, JOURNAL, LEDGER, JournalStore, ledger_path
from cakeflow.models.base import EditableModel
from cakeflow.models.loading import Loading, load_editable
from cakeflow.storage.folders import require_inside
from cakeflow.storage.hashing import file_hash, tensor_hash


@dataclass(frozen=True)
class Audit:
    """The outcome of an audit.

    Attributes:
        entries: The ledger.
        faults: What is wrong, entry by entry; empty if nothing is.
        head: Hash of the last entry: with a note of it, a ledger that was cut short is detected as well.
        unknown: Files that no entry names, such as a report written later.
    """

    entries: list[Entry]
    faults: list[str]
    head: str
    unknown: list[str]

    @property
    def leaves_model_unchanged(self) -> bool:
        """True if there are batches of facts, and none of them changed anything in the model."""
        batches = bodies(self.entries, BatchBody)
        return bool(batches) and not any(body.changes for body in batches)


def verify(run: Path, head: str | None = None) -> Audit:
    """Check the chain of a run's ledger, every file that it names, and that its changes follow on one another.

    Args:
        run: The run folder.
        head: The hash that the last entry must have.

    Raises:
        RunFolderError: If there is no ledger.
    """
    path = ledger_of(run)
    try:
        store = JournalStore(path.parent)
    except LedgerError as error:
        return Audit([], [str(error)], "", [])
    entries, named = store.ledger.entries, {path}
    faults = [fault for entry in entries for fault in _file_faults(run, store, entry, named)]
    faults += _breaks(store, entries)
    if path.read_bytes() and not path.read_bytes().endswith(b"\n"):
        faults.append(
            f"{path}, entry {len(whole_lines(path))}: cut off; a crash while it was written, or a changed file"
        )
    if head is not None and head != store.ledger.head:
        faults.append(f"{path}: the last entry is {store.ledger.head[:12]}, not {head[:12]}; entries are missing")
    unknown = sorted(str(each.relative_to(run)) for each in run.rglob("*") if each.is_file() and each not in named)
    return Audit(entries, list(dict.fromkeys(faults)), store.ledger.head, unknown)


def _file_faults(run: Path, store: JournalStore, entry: Entry, named: set[Path]) -> Iterator[str]:
    """Files of an entry that are not as they were written; adds those that it names to ``named``."""
    body = entry.body
    if not isinstance(body, (BatchBody, EndBody)):
        return
    folder = store.folder if isinstance(body, BatchBody) else run
    for name, expected in body.files.items():
        path, where = folder / name, f"{store.ledger.path}, entry {entry.number}"
        named.add(path)
        if Path(name).name != name:
            yield f"{where}: {name!r} is not a file name"
        elif path.is_symlink():
            yield f"{where}: {name} is a link; {FROM_A_COPY}"
        elif not path.is_file():
            yield f"{where}: {name} is missing; {FROM_A_COPY}"
        elif file_hash(path) != expected:
            yield f"{where}: {name} was changed after it was written; {FROM_A_COPY}"


def _breaks(store: JournalStore, entries: list[Entry]) -> Iterator[str]:
    """Batches that do not begin with the content that their places had."""
    now: dict[str, str] = {}
    for entry in entries:
        try:
            if isinstance(entry.body, RollbackBody):
                now |= entry.body.places
            elif isinstance(entry.body, BatchBody):
                step = store.read_step(entry)
                originals = {place: tensor_hash(each) for place, each in store.originals(entry).items()}
                for place, before in step.before.items():
                    if before != now.get(place, originals.get(place, before)):
                        yield f"{store.ledger.path}, entry {entry.number}: {place} does not begin where it ended"
                now |= step.after
        except EditError as error:
            yield str(error)
            return  # the following entries build on this one


def ledger_of(run: Path) -> Path:
    """The ledger of a run folder.

    Raises:
        RunFolderError: If there is none, or links lead from it out of the folder.
    """
    path = ledger_path(run)
    if not require_inside(path, run).is_file():
        raise RunFolderError(f"{run} is no run folder: it has no journal/{LEDGER}; give the folder that a fit printed")
    return path


def entries_of(run: Path) -> list[Entry]:
    """Return the ledger of a run folder.

    Raises:
        RunFolderError: If there is none.
        LedgerError: If it was changed after it was written.
    """
    return JournalStore(ledger_of(run).parent).ledger.entries


def base_of(run: Path, name: str | None = None, loading: Loading = Loading()) -> EditableModel:
    """The unedited model of a run.

    Args:
        run: The run folder.
        name: Name or folder of the model, if it cannot be loaded by the name that the run was started with.
        loading: How it is loaded; without a name, options that it leaves open are those of the run.

    Raises:
        RunFolderError: If there is no ledger.
        LedgerError: If it names no model.
        ConfigError: If the model does not load.
    """
    entries = entries_of(run)
    try:
        return load_editable(name or name_of_base(entries), **loading_of(entries, name, loading))
    except ConfigError as error:
        remedy = f"\n{run} was started with that name; where the unedited model is elsewhere now, give it: --model NAME"
        raise ConfigError(f"{error}{'' if name else remedy}") from error


def loading_of(entries: Sequence[Entry], name: str | None = None, loading: Loading = Loading()) -> dict[str, Any]:
    """Return the arguments with which ``base_of`` loads the unedited model: what a ledger names, then ``loading``.

    Args:
        entries: The ledger.
        name: As for ``base_of``; options of loading on record belong to the name on record.
        loading: What the user chose.
    """
    dtypes = [body.dtype for body in bodies(entries, ModelBody)]
    runs = [] if name else bodies(entries, RunBody)[-1:]
    known = {option: value for each in runs for option, value in each.loading.items() if option != "commit"}
    dtype = dtypes[-1].removeprefix("torch.") if dtypes else "auto"
    return {"dtype": dtype, **known, **loading.arguments()}


def name_of_base(entries: Sequence[Entry]) -> str:
    """Return the name of the unedited model that the run of a ledger was started with.

    Raises:
        LedgerError: If it names no model.
    """
    names = [body.model for body in bodies(entries, RunBody)]
    if not names:
        raise LedgerError("the ledger of the run names no model; name the unedited model: --model NAME")
    return names[-1]


def replay(
    run: Path,
    model: str | None = None,
    policies: Iterable[Policy] = (),
    *,
    judged: bool = True,
    loading: Loading = Loading(),
) -> Journal:
    """Repeat every batch of a run on the unedited model; every weight must come out as recorded, bit for bit.

    Args:
        run: The run folder.
        model: Name of the unedited model; see ``base_of``.
        policies: Policies that the model obeys from the start.
        judged: Whether to refuse a run that its policy has not judged yet.
        loading: How the model is loaded.

    Raises:
        ResumeError: If the model is another one, or a batch leads to other weights.
        LedgerError: If the ledger or a file is not as it was written.
        PolicyError: If a policy forbids the run, or has not judged it.
    """
    journal = Journal(base_of(run, model, loading))
    for policy in policies:
        journal.policies.obey(policy)
    journal.load(run / JOURNAL, judged=judged)
    return journal
