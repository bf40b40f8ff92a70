"""Commands beside Lightning's: plain functions, whose arguments are the options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from cakeflow.cli.export import run_apply, run_export
from cakeflow.cli.trace import run_facts, run_trace
from cakeflow.errors import ConfigError, LedgerError
from cakeflow.journal.audit import Audit, replay, verify
from cakeflow.journal.journal import Journal
from cakeflow.journal.ledger import Entry
from cakeflow.plugins import Plugin, find_plugins, load_plugins
from cakeflow.report import (
    RunFolder,
    compare_runs,
    ledger_table,
    plugins_table,
    render_page,
    runs_table,
    to_csv,
    to_markdown,
)
from cakeflow.storage.atomic import write_text


def run_plugins() -> list[Plugin]:
    """List the installed plugins: their short names, what they are, and which package brings them.

    Raises:
        PluginError: After the list, naming each plugin that cannot be used, and why.
    """
    Console().print(plugins_table(find_plugins()))
    return load_plugins()


def run_report(run: Path, out: Path | None = None) -> Path:
    """Write a run as one HTML page, which needs no network: metrics, every edit, layers, costs, config.

    Args:
        run: A run folder.
        out: The page; ``report.html`` in the run folder by default.

    Raises:
        RunFolderError: If the folder is none of a run, or has a broken file.
    """
    out = out or run / "report.html"
    write_text(out, render_page(RunFolder.read(run)))
    Console().print(f"written to {out}", soft_wrap=True, markup=False)
    return out


def run_compare(runs: list[Path], csv: Path | None = None, markdown: Path | None = None) -> list[dict[str, Any]]:
    """Show runs side by side: metrics after editing with 95 % intervals over records, time and memory.

    Runs of the same records under one protocol are also compared record by record with the first one.

    Args:
        runs: Run folders.
        csv: A file for one line per run, with the intervals' bounds.
        markdown: A file for the table.

    Raises:
        RunFolderError: If a folder is none of a run, or has a broken file.
    """
    rows, console = compare_runs([RunFolder.read(run) for run in runs]), Console()
    console.print(runs_table(rows))
    if len({row["protocol"] for row in rows}) > 1:
        console.print("these runs were measured under different protocols: their metrics cannot be compared")
    for path, write in ((csv, to_csv), (markdown, to_markdown)):
        if path is not None:
            write_text(path, write(rows))
            console.print(f"written to {path}", soft_wrap=True, markup=False)
    return rows


def run_log(run: Path) -> list[Entry]:
    """Show who did what to a model, and when: the ledger of a run.

    Args:
        run: A run folder.

    Raises:
        RunFolderError: If it is none.
        LedgerError: If the ledger was changed after it was written.
    """
    found = verify(run)
    if not found.entries and found.faults:
        raise LedgerError(found.faults[0])
    Console().print(ledger_table(found.entries))
    return found.entries


def run_verify(run: Path, head: str | None = None) -> Audit:
    """Check every hash of a run: the chain of its ledger, its files, and that its weights follow on one another.

    Args:
        run: A run folder.
        head: The hash that the ledger's last entry must have, if it was noted: only that shows missing last entries.

    Raises:
        LedgerError: Naming every entry that is not as it was written.
    """
    found, console = verify(run, head), Console()
    if found.faults:
        raise LedgerError("\n  ".join([f"{run}: {len(found.faults)} fault(s)", *found.faults]))
    console.print(f"{run}: {len(found.entries)} entries and all files are as they were written", soft_wrap=True)
    console.print(f"head {found.head}", soft_wrap=True)
    if found.unknown:
        console.print(f"files that no entry tells of: {', '.join(found.unknown)}", soft_wrap=True, markup=False)
    return found


def run_replay(run: Path, model: str | None = None) -> Journal:
    """Do a run's batches again from the unedited model: every weight must come out as recorded, bit for bit.

    Args:
        run: A run folder.
        model: The unedited model, where it is not found under the name that the run was started with.

    Raises:
        ResumeError: If the model is another one, or a batch leads to other weights.
        LedgerError: If the ledger or a file is not what was written.
    """
    journal = replay(run, model)
    places = [*dict.fromkeys(change.place for change in journal.changes)]
    told = f"{len(journal)} batches, {journal.edits} edits in {', '.join(places)}: all of it comes out as recorded"
    Console().print(f"{run}: {told}", soft_wrap=True, markup=False)
    return journal


def run_rollback(run: Path, n: int | None = None, batch: int | None = None, model: str | None = None) -> Journal:
    """Take back a run's last batches, or one of them; the ledger gets an entry, and the files stay for the record.

    Args:
        run: A run folder.
        n: How many batches; all by default.
        batch: Number of one batch instead, as ``cakeflow log`` shows it.
        model: As for ``cakeflow replay``.

    Raises:
        ConfigError: If there is no such batch.
        ResumeError: If the model is another one, or a batch leads to other weights.
    """
    if n is not None and n < 1:
        raise ConfigError(f"n must be at least 1 batch, got {n}")
    journal = replay(run, model)
    before = len(journal)
    journal.rollback(n, batch=batch)
    Console().print(f"{run}: {before - len(journal)} batches taken back, {len(journal)} left", soft_wrap=True)
    return journal


COMMANDS: dict[str, Callable[..., Any]] = {
    "trace": run_trace,
    "facts": run_facts,
    "plugins": run_plugins,
    "report": run_report,
    "compare": run_compare,
    "log": run_log,
    "verify": run_verify,
    "replay": run_replay,
    "rollback": run_rollback,
    "export": run_export,
    "apply": run_apply,
}
"""Name -> function."""
