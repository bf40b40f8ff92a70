"""Commands for run folders and plugins: plain functions whose arguments are the options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from cakeflow.cli.benchmark import run_benchmark
from cakeflow.cli.console import say
from cakeflow.cli.desk import run_desk
from cakeflow.cli.diff import run_diff
from cakeflow.cli.edit import run_edit, run_undo
from cakeflow.cli.export import run_apply, run_export
from cakeflow.cli.recipes import run_recipes
from cakeflow.cli.reproduce import run_reproduce
from cakeflow.cli.statistics import run_merge, run_statistics
from cakeflow.cli.trace import run_facts, run_trace
from cakeflow.cli.tune import run_tune
from cakeflow.errors import LedgerError, listed, require_count, with_faults
from cakeflow.export.manifest import batch_names
from cakeflow.journal.audit import Audit, ledger_of, replay, verify
from cakeflow.journal.journal import Journal
from cakeflow.journal.ledger import Entry
from cakeflow.models.loading import Loading
from cakeflow.plugins import Plugin, find_plugins, load_plugins
from cakeflow.report.comparison import compare_runs, plot_runs, to_csv, to_markdown
from cakeflow.report.figures import require_image, save_plot
from cakeflow.report.folder import RunFolder
from cakeflow.report.page import render_page
from cakeflow.report.tables import ledger_table, plugins_table, runs_table
from cakeflow.storage.atomic import write_text
from cakeflow.storage.locks import locked


def run_plugins() -> list[Plugin]:
    """List the installed plugins with their kind and package.

    Raises:
        PluginError: After the list, naming each plugin that cannot be used and the reason.
    """
    Console().print(plugins_table(find_plugins()))
    return load_plugins()


def run_report(run: Path, out: Path | None = None) -> Path:
    """Write a report of a run as one HTML page that works offline: metrics, edits, layers, costs and config.

    Args:
        run: A run folder.
        out: File of the page; by default ``report.html`` in the run folder.

    Raises:
        RunFolderError: If the folder is not a run folder, or has a damaged file.
    """
    out = out or run / "report.html"
    write_text(out, render_page(RunFolder.read(run)))
    say(f"written to {out}")
    return out


def run_compare(
    runs: list[Path], csv: Path | None = None, markdown: Path | None = None, plot: Path | None = None
) -> list[dict[str, Any]]:
    """Compare runs: metrics after editing with 95 % intervals over records, time, memory and settings that differ.

    Runs with the records and the protocol of the first run are also compared with it record by record.

    Args:
        runs: Run folders.
        csv: CSV file with one line per run, bounds of the intervals included.
        markdown: Markdown file of the table.
        plot: Image (.png, .svg or .pdf) of the metrics, and of what was measured along the edits.

    Raises:
        RunFolderError: If a folder is not a run folder, or has a damaged file.
        ConfigError: If ``plot`` names no image.
    """
    if plot is not None:
        require_image(plot)
    folders = [RunFolder.read(run) for run in runs]
    rows = compare_runs(folders)
    Console().print(runs_table(rows))
    if len({row["protocol"] for row in rows}) > 1:
        say("these runs were measured under different protocols: their metrics cannot be compared")
    for path, write in ((csv, to_csv), (markdown, to_markdown)):
        if path is not None:
            write_text(path, write(rows))
            say(f"written to {path}")
    if plot is not None:
        save_plot(plot_runs(folders), plot)
        say(f"written to {plot}")
    return rows


def run_log(run: Path) -> list[Entry]:
    """Show the ledger of a run: who changed the model, how and when.

    Args:
        run: A run folder.

    Raises:
        RunFolderError: If the folder is not a run folder.
        LedgerError: If the ledger was changed after it was written.
    """
    audit = verify(run)
    if not audit.entries and audit.faults:
        raise LedgerError(audit.faults[0])
    Console().print(ledger_table(audit.entries))
    return audit.entries


def run_verify(run: Path, head: str | None = None) -> Audit:
    """Verify that nothing in a run folder was changed: the hash chain of the ledger, the files and the weights.

    Args:
        run: A run folder.
        head: Expected hash of the last entry, as an earlier ``verify`` printed it; without it, entries missing at the
            end go unnoticed.

    Raises:
        LedgerError: Naming every entry that was changed after it was written.
    """
    audit = verify(run, head)
    if audit.faults:
        raise LedgerError(with_faults(f"{run}: {len(audit.faults)} fault(s)", audit.faults))
    say(f"{run}: {len(audit.entries)} entries and all files are as they were written")
    say(f"head {audit.head}")
    if audit.leaves_model_unchanged:
        say("the batches changed nothing in the model: their facts are put before questions when it is asked")
    if audit.unknown:
        say(f"files that no entry lists: {listed(audit.unknown)}")
    return audit


def run_replay(run: Path, model: str | None = None, loading: Loading = Loading()) -> Journal:
    """Repeat a run from the unedited model, and check that every weight comes out as recorded, bit for bit.

    Args:
        run: A run folder.
        model: Name or folder of the unedited model, if it cannot be loaded by the name that the run was started with.
        loading: --loading.NAME, how a model is loaded.

    Raises:
        ResumeError: If the model is another one, or a batch leads to other weights.
        LedgerError: If the ledger or a file was changed after it was written.
    """
    journal = replay(run, model, loading=loading)
    places = [*dict.fromkeys(change.place for change in journal.changes)]
    summary = f"{len(journal)} batches, {journal.edits} edits in {', '.join(places)}: every weight as recorded"
    say(f"{run}: {summary}")
    return journal


def run_rollback(
    run: Path,
    n: int | None = None,
    batch: int | None = None,
    model: str | None = None,
    loading: Loading = Loading(),
) -> Journal:
    """Take back the last batches of a run, or one batch; the ledger notes it, and the files of the run stay.

    Args:
        run: A run folder.
        n: Number of batches to take back; all by default.
        batch: Number of the one batch to take back instead, as ``cakeflow log`` shows it.
        model: Name or folder of the unedited model, if it cannot be loaded by the name that the run was started with.
        loading: --loading.NAME, how a model is loaded.

    Raises:
        ConfigError: If there are not as many batches, or no such batch.
        ResumeError: If the model is another one, or a batch leads to other weights.
        LockedError: If another process is writing the run.
    """
    require_count("n", n, 1, optional=True)
    with locked(ledger_of(run)):
        journal = replay(run, model, judged=False, loading=loading)  # what its policy has not judged may be taken back
        before = {step.number for step in journal}
        journal.rollback(n, batch=batch)
    removed = before - {step.number for step in journal}
    names = batch_names(removed) if removed else "no batch"
    say(f"{run}: {names} taken back, {len(journal)} remain")
    return journal


COMMANDS: dict[str, Callable[..., Any]] = {
    "edit": run_edit,
    "desk": run_desk,
    "statistics": run_statistics,
    "trace": run_trace,
    "facts": run_facts,
    "tune": run_tune,
    "benchmark": run_benchmark,
    "recipes": run_recipes,
    "plugins": run_plugins,
    "report": run_report,
    "compare": run_compare,
    "diff": run_diff,
    "log": run_log,
    "verify": run_verify,
    "replay": run_replay,
    "reproduce": run_reproduce,
    "rollback": run_rollback,
    "undo": run_undo,
    "export": run_export,
    "apply": run_apply,
}
"""Command -> function; its docstring is the help text."""
FURTHER: dict[str, Callable[..., Any]] = {"statistics merge": run_merge}
"""Two words -> function, beside the command of the first one."""
