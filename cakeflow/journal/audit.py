"""Whether a run folder is what was written, and whether its edits lead to the weights that it tells of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cakeflow.errors import EditError, LedgerError, RunFolderError
from cakeflow.journal.journal import Journal
from cakeflow.journal.ledger import Entry, bodies, whole_lines
from cakeflow.journal.schema import BatchBody, EndBody, ModelBody, RunBody
from cakeflow.journal.store import FROM_A_COPY, LEDGER, JournalStore
from cakeflow.models.language import LanguageModel
from cakeflow.models.loading import load_model
from cakeflow.storage.hashing import digest, tensor_hash


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        entries: The ledger.
        faults: What is wrong, entry by entry; empty if nothing is.
        head: Hash of the last entry: whoever has noted it sees a ledger that was cut short as well.
        unknown: Files that no entry tells of, such as a report written later.
    """

    entries: list[Entry]
    faults: list[str]
    head: str
    unknown: list[str]


def verify(run: Path, head: str | None = None) -> Audit:
    """Check the chain of a run's ledger, every file that it tells of, and that its weights follow on one another.

    Args:
        run: The run folder.
        head: The hash that the last entry must have.

    Raises:
        RunFolderError: If there is no ledger.
    """
    path = ledger_of(run)
    try:
        record = JournalStore(path.parent)
    except LedgerError as error:
        return Audit([], [str(error)], "", [])
    entries, told = record.ledger.entries, {path}
    faults = [fault for entry in entries for fault in _faults(run, record, entry, told)]
    faults += _breaks(record, entries)
    if path.read_bytes() and not path.read_bytes().endswith(b"\n"):
        faults.append(
            f"{path}, entry {len(whole_lines(path))}: cut off; a crash while it was written, or a changed file"
        )
    if head is not None and head != record.ledger.head:
        faults.append(f"{path}: the last entry is {record.ledger.head[:12]}, not {head[:12]}; entries are missing")
    unknown = sorted(str(each.relative_to(run)) for each in run.rglob("*") if each.is_file() and each not in told)
    return Audit(entries, list(dict.fromkeys(faults)), record.ledger.head, unknown)


def _faults(run: Path, record: JournalStore, entry: Entry, told: set[Path]) -> Iterator[str]:
    """Files of an entry that are not those that were written; notes in ``told`` which ones it tells of."""
    folder = {"batch": record.folder, "end": run}.get(entry.kind)
    if folder is None or not isinstance(entry.body, (BatchBody, EndBody)):
        return
    for name, hashed in entry.body.files.items():
        path, where = folder / name, f"{record.ledger.path}, entry {entry.number}"
        told.add(path)
        if Path(name).name != name:
            yield f"{where}: {name!r} is not a file name"
        elif not path.is_file():
            yield f"{where}: {name} is missing; {FROM_A_COPY}"
        elif digest(path) != hashed:
            yield f"{where}: {name} was changed after it was written; {FROM_A_COPY}"


def _breaks(record: JournalStore, entries: list[Entry]) -> Iterator[str]:
    """Batches that do not begin with the weights that were there."""
    now: dict[int, str] = {}
    for entry in entries:
        try:
            if entry.kind == "rollback":
                now |= record.taken_back(entry)[1]
            elif entry.kind == "batch":
                step = record.read_step(entry)
                originals = {layer: tensor_hash(each) for layer, each in record.originals(entry).items()}
                for layer, before in step.before.items():
                    if before != now.get(layer, originals.get(layer)):
                        yield f"{record.ledger.path}, entry {entry.number}: layer {layer} does not begin where it ended"
                now |= step.after
        except EditError as error:
            yield str(error)
            return  # what follows cannot be followed


def ledger_of(run: Path) -> Path:
    """The ledger of a run folder.

    Raises:
        RunFolderError: If there is none.
    """
    path = run / "journal" / LEDGER
    if not path.is_file():
        raise RunFolderError(f"{run} is no run folder: it has no journal/{LEDGER}; give the folder that a fit printed")
    return path


def base_of(run: Path, name: str | None = None) -> LanguageModel:
    """The unedited model of a run.

    Args:
        run: The run folder.
        name: The model's name or folder, where it is not at hand under the one that the run was started with.

    Raises:
        RunFolderError: If there is no ledger.
        LedgerError: If it names no model.
    """
    entries = JournalStore(ledger_of(run).parent).ledger.entries
    names = [body.model for body in bodies(entries, RunBody)]
    if name is None and not names:
        raise LedgerError(f"{run}: the ledger names no model; name the unedited model: --model NAME")
    dtypes = ["auto", *(body.dtype.removeprefix("torch.") for body in bodies(entries, ModelBody))]
    return load_model(name or names[-1], dtype=dtypes[-1])


def replay(run: Path, model: str | None = None) -> Journal:
    """Do every batch of a run again, from the unedited model; every weight must come out as recorded, bit for bit.

    Args:
        run: The run folder.
        model: See ``base_of``.

    Raises:
        ResumeError: If the model is another one, or a batch leads to other weights.
        LedgerError: If the ledger or a file is not what was written.
    """
    journal = Journal(base_of(run, model))
    journal.load(run / "journal")
    return journal
